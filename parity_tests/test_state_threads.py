"""Many threads over few slots: every score right, every slot in one place at every moment, and nobody stuck."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onetrans.features.requests import Request
from onetrans.runtime import Ranker, Scores
from onetrans.runtime.backends.base import BackendOptions, StatePool
from onetrans.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.cache.config import CacheConfig
from parity_tests.states import Reference, Watched, cached, difference, people, rank, rank_new, retrained, upto

USERS = "abcdefgh"
LENGTHS = (0, 1, 30, 62, 63, 64, 70, 100, 127, 128, 131, 190, 192, 200, 255, 300)
PATIENCE = 60.0  # seconds until a thread that should have ended counts as stuck
MOMENT = 0.1  # seconds in which a thread that may run on would have


class Exclusive(OnnxRuntimeCpu):
    """The backend, noting where two calls use one slot at a time."""

    def __init__(self, bundle: Bundle, options: BackendOptions | None = None) -> None:
        super().__init__(bundle, options)
        self.clashes: list[tuple[int, ...]] = []
        self.at_once = 0
        self._used: list[int] = []
        self._lock = threading.Lock()

    @contextmanager
    def _use(self, slots: Sequence[int]) -> Iterator[None]:
        with self._lock:
            self.clashes += [(slot,) for slot in slots if slot in self._used]
            self._used += slots
            self.at_once = max(self.at_once, len(self._used))
        try:
            yield
        finally:
            with self._lock:
                for slot in slots:
                    self._used.remove(slot)

    def prefill(self, pool: StatePool, slots: Sequence[int], inputs: Any) -> None:
        with self._use(slots):
            super().prefill(pool, slots, inputs)

    def append(self, pool: StatePool, slots: Sequence[int], inputs: Any) -> None:
        with self._use(slots):
            super().append(pool, slots, inputs)

    def decode(self, pool: StatePool, slots: Sequence[int], inputs: Any, counts: Any) -> dict[str, np.ndarray]:
        with self._use(slots):
            return super().decode(pool, slots, inputs, counts)


@pytest.fixture(scope="module")
def opened(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def requests(opened: Bundle) -> dict[str, list[Request]]:
    """Of each user, as he was at each of LENGTHS."""
    lives = people(opened.manifest.schema, USERS)
    return {user: [upto(lives[user], events) for events in LENGTHS] for user in USERS}


@pytest.fixture(scope="module")
def golds(requests: dict[str, list[Request]], reference: Reference) -> dict[str, list[dict[str, np.ndarray]]]:
    return {user: [reference.gold(request) for request in his] for user, his in requests.items()}


class Together:
    """Threads whose first error is the test's, and that must end."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.threads: list[threading.Thread] = []

    def start(self, work: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                self.errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        self.threads.append(thread)
        thread.start()
        return thread

    def end(self) -> None:
        for thread in self.threads:
            ends(thread)
        if self.errors:
            raise self.errors[0]


def ends(thread: threading.Thread) -> None:
    thread.join(PATIENCE)
    assert not thread.is_alive(), "stuck"


def waits(thread: threading.Thread) -> None:
    thread.join(MOMENT)
    assert thread.is_alive()


@contextmanager
def watching(ranker: Ranker) -> Iterator[list[int]]:
    """Checks the cache over and over from a thread of its own; how often, in the end."""
    over, checks, watch = threading.Event(), [0], Together()

    def look() -> None:
        while not over.wait(0.0005):
            ranker.check_integrity()
            assert len(ranker.cache) <= ranker.cache.capacity
            checks[0] += 1

    watch.start(look)
    try:
        yield checks
    finally:
        over.set()
        watch.end()
    ranker.check_integrity()


# users of all threads, slots: few users and room for most, one user alone, many users and hardly any room
CROWDS = [("abcd", 6), ("a", 4), ("abcdefgh", 4), ("abcdefgh", 9)]


@pytest.mark.parametrize(("users", "slots"), CROWDS)
def test_every_score_is_right_whoever_else_is_served(
    opened: Bundle,
    requests: dict[str, list[Request]],
    golds: dict[str, list[dict[str, np.ndarray]]],
    reference: Reference,
    users: str,
    slots: int,
) -> None:
    """Five threads: users grow step by step, go back in time, come in batches, and are invalidated now and then."""
    backend = Exclusive(opened, BackendOptions(threads=1))
    ranker, _ = cached(opened, backend, slots=slots, compute_slots=2)
    at = dict.fromkeys(users, 0)  # shared by the threads, as users are
    kinds: list[str] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(60):
            chosen = rng.permutation(list(users))[: rng.integers(1, 4)].tolist()
            if rng.random() < 0.05:
                ranker.invalidate(chosen[0])
            for user in chosen:
                at[user] = at[user] + 1 if rng.random() < 0.6 else at[user] if rng.random() < 0.8 else 0
                at[user] %= len(LENGTHS)
            now = [min(at[user], len(LENGTHS) - 1) for user in chosen]
            found = ranker.rank_batch([requests[user][index] for user, index in zip(chosen, now, strict=True)])
            for user, index, scores in zip(chosen, now, found, strict=True):
                assert scores.logits["ctr"].shape == golds[user][index]["ctr"].shape
                reference.check(scores.logits, golds[user][index])
                kinds.append(scores.result)

    crowd = Together()
    with watching(ranker) as checks:
        for seed in range(5):
            crowd.start(lambda seed=seed: work(seed))
        crowd.end()
    assert backend.clashes == []
    assert (backend.at_once > 1) == (len(users) > 1)
    assert checks[0] > 20
    assert {"prefill", "append", "reuse"} == set(kinds)
    assert (ranker.cache.counts["evicted"] > 0) == (len(users) > ranker.cache.capacity)


class Gate:
    """Lets the first thread that has run a graph wait there until it is opened."""

    def __init__(self, backend: Watched, graph: str) -> None:
        self.reached, self._open, self._graph = threading.Event(), threading.Event(), graph
        self.ran: list[str] = []
        backend.ran = self._ran

    def _ran(self, graph: str) -> None:
        self.ran.append(graph)
        if graph == self._graph and not self.reached.is_set():
            self.reached.set()
            assert self._open.wait(PATIENCE)

    def open(self) -> None:
        self._open.set()


@pytest.mark.parametrize("graph", ["prefill", "append", "decode"])
def test_a_user_s_second_request_waits_for_the_first(
    opened: Bundle,
    requests: dict[str, list[Request]],
    golds: dict[str, list[dict[str, np.ndarray]]],
    reference: Reference,
    graph: str,
) -> None:
    backend = Watched(opened, BackendOptions(threads=1))
    ranker, _ = cached(opened, backend, slots=8)
    rank(ranker, requests["a"][6])
    first, second = (9, 10) if graph == "prefill" else (7, 8)
    found: dict[int, Scores] = {}

    def ask(index: int, user: str = "a") -> None:
        found[index] = rank(ranker, requests[user][index])

    gate, crowd = Gate(backend, graph), Together()
    crowd.start(lambda: ask(first))
    assert gate.reached.wait(PATIENCE)
    before = list(gate.ran)
    same = crowd.start(lambda: ask(second))
    waits(same)
    assert gate.ran == before  # it has not begun
    other = crowd.start(lambda: ask(3, "b"))  # while others are served
    ends(other)
    ranker.check_integrity()
    gate.open()
    crowd.end()
    assert found[second].result == "append"  # to what the first one left
    for index, user in ((first, "a"), (second, "a"), (3, "b")):
        reference.check(found[index].logits, golds[user][index])
    ranker.check_integrity()


def test_an_invalidation_waits_for_the_request_under_way(opened: Bundle, requests: dict[str, list[Request]]) -> None:
    backend = Watched(opened, BackendOptions(threads=1))
    ranker, _ = cached(opened, backend, slots=8)
    rank(ranker, requests["a"][6])
    gate, crowd, forgotten = Gate(backend, "append"), Together(), []
    crowd.start(lambda: rank(ranker, requests["a"][7]))
    assert gate.reached.wait(PATIENCE)
    invalidation = crowd.start(lambda: forgotten.append(ranker.invalidate("a")))
    waits(invalidation)
    assert len(ranker.cache) == 1
    assert not ranker.invalidate("b")  # nobody uses b
    assert ranker.cache.clear() == 0  # passes over a
    gate.open()
    crowd.end()
    assert forgotten == [True]
    assert len(ranker.cache) == 0


def test_an_invalidation_reaches_a_state_on_its_way_to_the_disk(
    opened: Bundle, requests: dict[str, list[Request]], tmp_path: Path
) -> None:
    """b drives a out of the memory; a is neither there nor in the offload file until b's request ends."""
    backend = Watched(opened, BackendOptions(threads=1))
    offload = {"offload": tmp_path, "offload_memory": 4 * opened.manifest.bytes_per_user}
    ranker, _ = cached(opened, backend, slots=2, **offload)
    rank(ranker, requests["a"][6])
    gate, crowd, forgotten = Gate(backend, "decode"), Together(), []
    crowd.start(lambda: rank(ranker, requests["b"][6]))
    assert gate.reached.wait(PATIENCE)
    assert [user for _, user in ranker.cache.entries()] == ["b"]
    waits(crowd.start(lambda: forgotten.append(ranker.invalidate("a"))))
    gate.open()
    crowd.end()
    assert forgotten == [True]
    assert rank(ranker, requests["a"][6]).result == "prefill"
    ranker.check_integrity()


def test_where_no_slot_is_left_to_work_in_a_prefill_waits_and_a_reuse_does_not(
    opened: Bundle,
    requests: dict[str, list[Request]],
    golds: dict[str, list[dict[str, np.ndarray]]],
    reference: Reference,
) -> None:
    backend = Watched(opened, BackendOptions(threads=1))
    ranker, _ = cached(opened, backend, slots=4)
    assert ranker.cache.compute_slots == 1
    rank(ranker, requests["a"][6])
    found: dict[str, Scores] = {}

    def ask(user: str, index: int) -> None:
        found[user] = rank(ranker, requests[user][index])

    gate, crowd = Gate(backend, "prefill"), Together()
    crowd.start(lambda: ask("b", 7))
    assert gate.reached.wait(PATIENCE)
    third = crowd.start(lambda: ask("c", 8))
    waits(third)
    cached_one = crowd.start(lambda: ask("a", 7))
    ends(cached_one)
    assert gate.ran == ["prefill", "append", "decode"]  # b's first; then a's, while c has not begun
    ranker.check_integrity()
    gate.open()
    crowd.end()
    assert {user: scores.result for user, scores in found.items()} == {"a": "append", "b": "prefill", "c": "prefill"}
    for user, index in (("a", 7), ("b", 7), ("c", 8)):
        reference.check(found[user].logits, golds[user][index])


def test_batches_without_a_cache_wait_for_slots_too(
    opened: Bundle,
    requests: dict[str, list[Request]],
    golds: dict[str, list[dict[str, np.ndarray]]],
    reference: Reference,
) -> None:
    ranker = Ranker(opened, Exclusive(opened, BackendOptions(threads=1)), CacheConfig(compute_slots=3))

    def work() -> None:
        for index in range(len(LENGTHS)):
            for user, scores in zip(USERS, ranker.rank_batch([requests[u][index] for u in USERS]), strict=True):
                reference.check(scores.logits, golds[user][index])

    crowd = Together()
    with watching(ranker):
        for _ in range(4):
            crowd.start(work)
        crowd.end()
    assert ranker.backend.clashes == []
    assert ranker.cache.entries() == {}


def test_requests_work_across_reloads(
    tiny_bundle: Path,
    requests: dict[str, list[Request]],
    golds: dict[str, list[dict[str, np.ndarray]]],
    reference: Reference,
    tmp_path: Path,
) -> None:
    """Each score is that of one of the two versions, and of no mixture, which is far from both.

    Of the newer one there is no reference: two results that are each within the bound of one are within twice of it.
    """
    newer = retrained(tiny_bundle, tmp_path / "newer")
    fresh = Ranker.open(newer, options=BackendOptions(threads=1))
    expected = {user: [rank_new(fresh, request).logits for request in his] for user, his in requests.items()}
    one = fresh.bundle.manifest.bytes_per_user
    ranker = Ranker.open(tiny_bundle, options=BackendOptions(threads=1), cache=CacheConfig(state_memory=8 * one))
    versions, over = [0, 0], threading.Event()

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not over.is_set():
            user = rng.choice(list(USERS[:4]))
            for index in range(int(rng.integers(4, 10)), 12):
                scores, gold = rank(ranker, requests[user][index]), golds[user][index]
                is_new = difference(scores.logits, gold) > difference(scores.logits, expected[user][index])
                versions[is_new] += 1
                if is_new:
                    assert difference(scores.logits, expected[user][index]) <= 2 * reference.bound(gold)
                else:
                    reference.check(scores.logits, gold)

    crowd = Together()
    with watching(ranker):
        for seed in range(4):
            crowd.start(lambda seed=seed: work(seed))
        for path in (newer, tiny_bundle) * 5:
            threading.Event().wait(0.1)
            ranker.reload(path)
        over.set()
        crowd.end()
    assert min(versions) > 20
    apart = [difference(golds[user][index], expected[user][index]) for user in USERS for index in range(len(LENGTHS))]
    assert min(apart) > 100 * reference.error  # so the versions cannot be taken for each other
