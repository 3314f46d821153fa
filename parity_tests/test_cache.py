"""The slots of the state cache without a backend: who holds which, who must go, who waits, and its configuration."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from onetrans.errors import ConfigError, StateError
from onetrans.runtime.cache.config import CacheConfig, parse_bytes
from onetrans.runtime.cache.lookup import CacheEntry
from onetrans.runtime.cache.state_cache import Key, StateCache

PATIENCE = 10.0  # seconds until a thread that should have ended counts as stuck


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def key(user: str) -> Key:
    return ("v1", user)


def put(cache: StateCache, *users: str) -> None:
    """Prefills users one after another."""
    for user in users:
        with cache.use([key(user)]) as lease:
            (slot,) = lease.take(1)
            lease.commit(key(user), CacheEntry(slot=slot, tokens=1, events=b"", context=b""))
        cache.check_integrity()


def touch(cache: StateCache, user: str) -> CacheEntry | None:
    with cache.use([key(user)]) as lease:
        return lease.look(key(user))


def users(cache: StateCache) -> list[str]:
    return [user for _, user in cache.entries()]


def started(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def assert_waits(thread: threading.Thread) -> None:
    thread.join(0.1)
    assert thread.is_alive()


def assert_ends(thread: threading.Thread) -> None:
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_the_least_recently_used_state_goes_first() -> None:
    cache = StateCache(5, compute_slots=1)
    put(cache, "a", "b", "c", "d")
    assert touch(cache, "a") is not None
    put(cache, "b")  # prefilled anew
    assert users(cache) == ["c", "d", "a", "b"]
    put(cache, "e", "f")
    assert users(cache) == ["a", "b", "e", "f"]
    assert touch(cache, "c") is None
    assert cache.counts == {"evicted": 2}
    assert len(cache) == cache.capacity == 4


def test_a_prefill_takes_another_slot_and_frees_the_old_one() -> None:
    cache = StateCache(3, compute_slots=1)
    put(cache, "a")
    old = cache.entries()[key("a")].slot
    with cache.use([key("a")]) as lease:
        (slot,) = lease.take(1)
        assert slot != old
        lease.commit(key("a"), CacheEntry(slot=slot, tokens=2, events=b"", context=b""))
        cache.check_integrity()
    assert cache.entries()[key("a")].slot == slot
    put(cache, "b", "c")
    assert {entry.slot for entry in cache.entries().values()} < {0, 1, 2}
    assert old in {entry.slot for entry in cache.entries().values()}


def test_what_was_not_committed_is_given_back() -> None:
    cache = StateCache(4, compute_slots=2)
    put(cache, "a")
    before = cache.entries()
    with pytest.raises(ZeroDivisionError), cache.use([key("a"), key("b")]) as lease:
        assert len(set(lease.take(2))) == 2
        cache.check_integrity()
        raise ZeroDivisionError
    assert cache.entries() == before
    cache.check_integrity()
    with cache.use([key("b")]) as lease:  # the two are free again, or this would wait for ever
        assert len(lease.take(2)) == 2


def test_a_state_in_use_is_never_evicted() -> None:
    cache = StateCache(3, compute_slots=1)
    put(cache, "old", "new")
    with cache.use([key("old")]):
        put(cache, "other")
        assert users(cache) == ["old", "other"]
    put(cache, "another")
    assert users(cache) == ["other", "another"]


def test_a_state_is_turned_away_where_all_are_in_use() -> None:
    cache = StateCache(3, compute_slots=1)
    put(cache, "a", "b")
    with cache.use([key("a"), key("b")]):
        put(cache, "c")
        assert users(cache) == ["a", "b"]
        assert cache.counts == {"turned_away": 1}
    put(cache, "c")
    assert users(cache) == ["b", "c"]


def test_a_state_is_used_until_its_time_is_over() -> None:
    clock = Clock()
    cache = StateCache(4, compute_slots=1, ttl=10.0, clock=clock)
    put(cache, "a")
    clock.now = 6.0
    put(cache, "b")
    clock.now = 10.0
    assert touch(cache, "a") is not None  # which does not make it younger
    clock.now = 10.5
    assert touch(cache, "a") is None
    assert users(cache) == ["b"]
    assert cache.counts == {"expired": 1}
    cache.check_integrity()
    put(cache, "a")
    clock.now = 16.5
    with cache.use([key("b")]):
        assert cache.expire() == 0
    assert cache.expire() == 1
    assert users(cache) == ["a"]
    assert cache.counts == {"expired": 2}
    cache.check_integrity()


def test_without_a_time_limit_states_stay() -> None:
    clock = Clock()
    cache = StateCache(2, compute_slots=1, clock=clock)
    put(cache, "a")
    clock.now = 1e12
    assert cache.expire() == 0
    assert touch(cache, "a") is not None


def test_invalidate_and_clear_forget() -> None:
    cache = StateCache(6, compute_slots=1)
    put(cache, "a", "b", "c", "d", "e")
    assert cache.invalidate(key("c"))
    assert not cache.invalidate(key("c"))
    assert not cache.invalidate(("v2", "a"))
    with cache.use([key("d")]):
        assert cache.clear(keep=lambda key: key[1] == "b") == 2
        assert users(cache) == ["b", "d"]
    assert cache.clear() == 2
    assert users(cache) == []
    assert cache.counts == {"invalidated": 5}
    cache.check_integrity()
    put(cache, "a", "b", "c", "d", "e")


def test_states_of_two_model_versions_are_two_states() -> None:
    cache = StateCache(4, compute_slots=1)
    put(cache, "a")
    with cache.use([("v2", "a")]) as lease:
        assert lease.look(("v2", "a")) is None


def test_visit_passes_over_states_in_use() -> None:
    cache = StateCache(4, compute_slots=1)
    put(cache, "a", "b", "c")
    seen: list[str] = []
    with cache.use([key("b")]):
        cache.visit(lambda key, entry: seen.append(key[1]))
    assert seen == ["a", "c"]


def test_a_users_requests_run_one_after_another() -> None:
    cache = StateCache(4, compute_slots=2)
    put(cache, "a", "b")
    with cache.use([key("a")]):
        same, other = (started(lambda user=user: touch(cache, user)) for user in "ab")
        assert_ends(other)
        assert_waits(same)
        gone = started(lambda: cache.invalidate(key("a")))
        assert_waits(gone)
        assert users(cache)[-1] == "b"
        assert "a" in users(cache)
    assert_ends(same)
    assert_ends(gone)
    assert users(cache) == ["b"]


def test_who_finds_no_slot_to_work_in_waits() -> None:
    cache = StateCache(4, compute_slots=2)
    with cache.use([key("a")]) as lease:
        lease.take(1)
        one, two = (started(lambda user=user, n=n: take(cache, user, n)) for user, n in (("b", 1), ("c", 2)))
        assert_ends(one)
        assert_waits(two)
        cache.check_integrity()
    assert_ends(two)
    cache.check_integrity()


def take(cache: StateCache, user: str, count: int) -> None:
    with cache.use([key(user)]) as lease:
        lease.take(count)


def test_batches_that_share_users_in_any_order_do_not_wait_for_each_other_for_ever() -> None:
    cache = StateCache(8, compute_slots=2)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(300):
            chosen = rng.permutation(list("abc"))[:2].tolist()
            with cache.use([key(user) for user in chosen]) as lease:
                for user, slot in zip(chosen, lease.take(2), strict=True):
                    lease.commit(key(user), CacheEntry(slot=slot, tokens=1, events=b"", context=b""))
                cache.check_integrity()

    threads = [started(lambda seed=seed: work(seed)) for seed in range(4)]
    for thread in threads:
        assert_ends(thread)
    cache.check_integrity()
    assert sorted(users(cache)) == ["a", "b", "c"]


def lease_too_many(cache: StateCache) -> None:
    cache._leased.update(cache._free)
    cache._free.clear()


def cache_too_many(cache: StateCache) -> None:
    for slot in cache._free:
        cache._entries[key(f"more{slot}")] = CacheEntry(slot=slot, tokens=1, events=b"", context=b"")
    cache._free.clear()


CORRUPTIONS: dict[str, Callable[[StateCache], object]] = {
    "a free slot twice": lambda cache: cache._free.append(cache._free[0]),
    "a free slot lost": lambda cache: cache._free.pop(),
    "cached and free": lambda cache: cache._free.append(cache.entries()[key("a")].slot),
    "cached and leased": lambda cache: cache._leased.add(cache.entries()[key("a")].slot),
    "two users in one slot": lambda cache: cache._entries.update({key("b"): cache._entries[key("a")]}),
    "a state without its slot": lambda cache: cache._entries.pop(key("a")),
    "a slot that is none": lambda cache: cache._free.append(cache.slots),
    "more leased than may": lease_too_many,
    "more cached than may": cache_too_many,
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_a_broken_cache_is_noticed(corrupt: Callable[[StateCache], object]) -> None:
    cache = StateCache(4, compute_slots=1)
    put(cache, "a", "b")
    corrupt(cache)
    with pytest.raises(StateError, match="the state cache is broken"):
        cache.check_integrity()


@pytest.mark.parametrize(
    ("slots", "options", "message"),
    [
        (4, {"compute_slots": 0}, "compute_slots is 0; of 4 slots, 1 to 4 can be kept"),
        (4, {"compute_slots": 5}, "compute_slots is 5; of 4 slots, 1 to 4 can be kept"),
        (4, {"compute_slots": 1, "ttl": 0}, "ttl is 0; give seconds above 0"),
        (4, {"compute_slots": 1, "ttl": -1.0}, "ttl is -1.0; give seconds above 0"),
        (4, {"compute_slots": 1, "ttl": float("nan")}, "ttl is nan; give seconds above 0"),
    ],
)
def test_numbers_that_leave_nothing_to_work_with(slots: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        StateCache(slots, **options)


@pytest.mark.parametrize(
    ("memory", "compute_slots", "expected"),
    [(0, 8, (8, 8)), (200, 8, (2, 1)), (299, 8, (2, 1)), (1600, 8, (16, 4)), (6400, 8, (64, 8)), (6400, 3, (64, 3))],
)
def test_slots_follow_from_the_memory(memory: int, compute_slots: int, expected: tuple[int, int]) -> None:
    assert CacheConfig(state_memory=memory, compute_slots=compute_slots).slots(100) == expected


@pytest.mark.parametrize("memory", [1, 99, 100, 199])
def test_memory_for_less_than_two_users_is_refused(memory: int) -> None:
    with pytest.raises(ConfigError) as caught:
        CacheConfig(state_memory=memory).slots(100)
    assert str(caught.value) == (
        f"state memory of {memory} bytes holds {memory // 100} users of 100 bytes; give at least 200: one cached, one"
        " being computed"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reuse": "sloppy"}, "reuse 'sloppy' is not one of exact, stale"),
        ({"state_memory": -1}, "state_memory is -1; it must be at least 0"),
        ({"compute_slots": 0}, "compute_slots is 0; it must be at least 1"),
        ({"stale_crossings": 0}, "stale_crossings is 0; it must be at least 1"),
        ({"drift_every": 0}, "drift_every is 0; it must be at least 1"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        CacheConfig(**options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("1073741824", 2**30),
        ("12B", 12),
        ("500 MB", 500_000_000),
        ("4GiB", 2**32),
        ("4gib", 2**32),
        (" 1.5 KiB ", 1536),
        ("2TiB", 2**41),
        ("0.5KB", 500),
        ("999999999999999", 999_999_999_999_999),
        ("1.1 GB", 1_100_000_000),
    ],
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "4 Gigs", "1,5GB", "4GiB2", "nan", "inf", "0x10", "9" * 400])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_bytes(text)
    assert (
        str(caught.value) == f"{text!r} is not a size; give a number with B, KB, MB, GB, KiB, MiB, GiB or TiB, as 4GiB"
    )


def test_many_slots_and_many_users_are_had_in_the_order_of_arrival() -> None:
    """Whoever needs all slots, or two users at once, would else wait for as long as others come one by one."""
    cache = StateCache(8, compute_slots=4)
    order: list[str] = []

    def ask(name: str, users: list[str], slots: int) -> None:
        with cache.use([("v", user) for user in users]) as lease:
            lease.take(slots)
            order.append(name)

    def come(name: str, users: list[str], slots: int, waiting: Callable[[], int]) -> threading.Thread:
        before = waiting()
        thread = threading.Thread(target=ask, args=(name, users, slots), daemon=True)
        thread.start()
        deadline = time.monotonic() + 10
        while waiting() == before and time.monotonic() < deadline:
            time.sleep(0.001)
        assert waiting() == before + 1
        return thread

    with cache.use([("v", "busy")]) as lease:
        lease.take(1)
        slots = [come("all slots", ["a"], 4, lambda: len(cache._queue))]
        slots += [come(f"one slot {i}", [f"b{i}"], 1, lambda: len(cache._queue)) for i in range(3)]  # 3 are free
        users = [come("both users", ["busy", "c"], 0, lambda: len(cache._waiting))]
        users += [come("one user", ["c"], 0, lambda: len(cache._waiting))]  # c itself is free
        assert order == []
        ask("another", ["d"], 0)
    for thread in (*slots, *users):
        thread.join(10)
        assert not thread.is_alive()
    assert order[0] == "another"
    assert next(name for name in order if "slot" in name) == "all slots"
    assert [name for name in order if "user" in name] == ["both users", "one user"]
    assert not cache._waiting
    assert not cache._queue
    cache.check_integrity()
