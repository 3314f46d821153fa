"""States that leave the memory come back bit by bit, or rounded where that was asked for."""

from __future__ import annotations

import dataclasses
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from onetrans.errors import ConfigError, JobError
from onetrans.features.random_requests import first_events
from onetrans.features.requests import Request
from onetrans.runtime import CacheConfig, Ranker, Scores
from onetrans.runtime.backends.base import BackendOptions
from onetrans.runtime.cache.lookup import CacheEntry
from onetrans.runtime.cache.offload import OffloadFile
from parity_tests.conftest import request_of
from parity_tests.states import retrained

USERS = 12


class FailedError(Exception):
    """Of a step that was made to fail."""


@pytest.fixture(scope="module")
def plain(tiny_bundle: Path) -> Ranker:
    return Ranker.open(tiny_bundle, options=BackendOptions(threads=1))


@pytest.fixture(scope="module")
def users(plain: Ranker) -> list[Request]:
    schema = plain.bundle.manifest.schema
    return [request_of(schema, events=63, candidates=20, seed=user) for user in range(USERS)]


def offloading(bundle: Path, folder: Path, *, slots: int = 6, room: int = USERS, **options: object) -> Ranker:
    size = Ranker.open(bundle, options=BackendOptions(threads=1)).bundle.manifest.bytes_per_user
    config = CacheConfig(state_memory=slots * size, offload=folder, offload_memory=room * size, **options)  # type: ignore[arg-type]
    return Ranker.open(bundle, options=BackendOptions(threads=1), cache=config)


def ask(ranker: Ranker, users: list[Request], user: int, events: int) -> Scores:
    return ranker.rank_batch([first_events(users[user], events, user=f"u{user}")])[0]


def difference(a: Scores, b: Scores) -> float:
    return max(float(np.abs(a.logits[task] - b.logits[task]).max()) for task in a.logits)


def test_every_user_comes_back_bit_by_bit_though_few_fit_the_memory(
    tiny_bundle: Path, users: list[Request], tmp_path: Path
) -> None:
    ranker = offloading(tiny_bundle, tmp_path)
    first = [ask(ranker, users, user, 40) for user in range(USERS)]
    assert {scores.result for scores in first} == {"prefill"}
    assert len(ranker.cache) == ranker.cache.capacity < USERS
    assert ranker.offload is not None
    assert len(ranker.cache) + len(ranker.offload) == USERS
    for user in range(USERS):
        again = ask(ranker, users, user, 40)
        assert again.result == "reuse"
        assert "load" in again.seconds
        assert difference(again, first[user]) == 0.0
        ranker.check_integrity()


def test_appends_and_other_contexts_go_on_from_a_loaded_state(
    tiny_bundle: Path, plain: Ranker, users: list[Request], tmp_path: Path
) -> None:
    ranker = offloading(tiny_bundle, tmp_path)
    never = offloading(tiny_bundle, tmp_path, slots=4 * USERS)
    for events in (10, 11, 30, 63):
        for user in range(USERS):
            found, kept = (ask(r, users, user, events) for r in (ranker, never))
            assert found.result == kept.result == ("prefill" if events == 10 else "append")
            assert ("load" in found.seconds) == (events > 10)
            assert difference(found, kept) == 0.0  # the same graphs over the same bytes
    other = dataclasses.replace(users[0], profile=users[1].profile, user="u0")
    changed, expected = ranker.rank_batch([other])[0], plain.rank_batch([dataclasses.replace(other, user="")])[0]
    assert changed.result == "reuse"
    assert "load" in changed.seconds
    assert difference(changed, expected) <= 1e-6 < difference(changed, ask(plain, users, 0, 63))


def test_a_batch_loads_what_it_needs(tiny_bundle: Path, users: list[Request], tmp_path: Path) -> None:
    ranker = offloading(tiny_bundle, tmp_path, slots=9)
    first = ranker.rank_batch([first_events(user, 40, user=f"u{i}") for i, user in enumerate(users)])
    again = ranker.rank_batch([first_events(user, 40, user=f"u{i}") for i, user in enumerate(users)])
    assert {scores.result for scores in again} == {"reuse"}
    assert max(difference(a, b) for a, b in zip(first, again, strict=True)) <= 1e-6  # batched with other users
    ranker.check_integrity()


def test_half_precision_rounds_and_says_so_by_its_size(tiny_bundle: Path, users: list[Request], tmp_path: Path) -> None:
    ranker = offloading(tiny_bundle, tmp_path, offload_precision="float16")
    assert ranker.offload is not None
    manifest = ranker.bundle.manifest
    whole = sum(t.bytes_per_user for t in manifest.state if t.dtype == "int64")
    assert ranker.offload.bytes_per_user == whole + (manifest.bytes_per_user - whole) // 2
    first = [ask(ranker, users, user, 40) for user in range(USERS)]
    again = [ask(ranker, users, user, 40) for user in range(USERS)]
    errors = [difference(a, b) for a, b in zip(first, again, strict=True)]
    largest = max(float(np.abs(v).max()) for scores in first for v in scores.logits.values())
    # Rounding of K and V moves a logit by no more than a few units of half precision of its own size.
    assert 0 < max(errors) <= 4 * 2.0**-10 * largest


def test_a_changed_history_does_not_use_what_was_offloaded(
    tiny_bundle: Path, plain: Ranker, users: list[Request], tmp_path: Path
) -> None:
    ranker = offloading(tiny_bundle, tmp_path)
    for user in range(USERS):
        ask(ranker, users, user, 40)
    assert ranker.offload is not None
    other = dataclasses.replace(first_events(users[5], 40), user="u0")  # another user's events under this name
    found = ranker.rank_batch([other])[0]
    assert found.result == "prefill"
    assert difference(found, ask(plain, users, 5, 40)) <= 1e-6
    assert ranker.offload.look((ranker._version.name, "u0")) is None


def test_invalidated_expired_and_outdated_states_are_not_loaded(
    tiny_bundle: Path, users: list[Request], tmp_path: Path
) -> None:
    ranker = offloading(tiny_bundle, tmp_path, ttl=50.0)
    now = [0.0]
    ranker.cache.clock = lambda: now[0]
    for user in range(USERS):
        ask(ranker, users, user, 40)
    assert ranker.invalidate("u0")  # offloaded by now
    assert ask(ranker, users, 0, 40).result == "prefill"
    now[0] = 49.0
    assert ask(ranker, users, 1, 40).result == "reuse"
    now[0] = 51.0  # loading did not make it younger
    assert ask(ranker, users, 1, 40).result == "prefill"
    assert ask(ranker, users, 2, 40).result == "prefill"
    ranker.reload(tiny_bundle)  # the same version
    assert ask(ranker, users, 1, 40).result == "reuse"
    ranker.reload(retrained(tiny_bundle, tmp_path / "retrained"))
    assert ranker.offload is not None
    assert len(ranker.offload) == len(ranker.cache) == 0
    assert ask(ranker, users, 1, 40).result == "prefill"


def test_the_first_offloaded_goes_first_and_none_is_written_twice(plain: Ranker, tmp_path: Path) -> None:
    manifest = plain.bundle.manifest
    file = OffloadFile(manifest, tmp_path, 3 * manifest.bytes_per_user)
    assert file.slots == 3
    pool = plain.backend.allocate(1)
    parsed = plain.encoder.parse(request_of(manifest.schema, events=0, candidates=1))
    plain.backend.prefill(pool, [0], plain.encoder.user_inputs([parsed]))
    state = pool.read(0)
    for user in ("a", "b", "a", "c", "d"):
        assert file.put(("v", user), CacheEntry(slot=0, tokens=0, events=b"", context=b""), state)
    assert [user for user in "abcd" if file.look(("v", user))] == ["a", "c", "d"]
    assert file.take(("v", "b")) is None
    taken = file.take(("v", "a"))
    assert taken is not None
    assert all(np.array_equal(taken[name], state[name]) for name in state)
    assert file.take(("v", "a")) is None
    assert len(file) == 2
    assert file.clear() == 2


def test_what_half_precision_cannot_hold_is_not_offloaded(plain: Ranker, tmp_path: Path) -> None:
    manifest = plain.bundle.manifest
    file = OffloadFile(manifest, tmp_path, manifest.bytes_per_user, "float16")
    pool = plain.backend.allocate(1)
    state = pool.read(0)
    state["k0"][0, 0, 0, 0] = 70_000.0
    assert not file.put(("v", "a"), CacheEntry(slot=0, tokens=0, events=b"", context=b""), state)
    assert len(file) == 0


def test_a_disk_that_fails_costs_a_prefill_and_is_logged(
    tiny_bundle: Path, plain: Ranker, users: list[Request], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ranker = offloading(tiny_bundle, tmp_path)
    for user in range(USERS):
        ask(ranker, users, user, 40)
    assert ranker.offload is not None
    ranker.offload._file.truncate(0)
    found = ask(ranker, users, 0, 40)
    assert found.result == "prefill"
    assert difference(found, ask(plain, users, 0, 40)) <= 1e-6
    assert "could not be read" in caplog.text
    ranker.check_integrity()


def test_the_file_has_no_name(tiny_bundle: Path, tmp_path: Path) -> None:
    ranker = offloading(tiny_bundle, tmp_path)
    assert ranker.offload is not None
    assert list(tmp_path.iterdir()) == []


def test_wrong_settings_get_one_clear_line(plain: Ranker, tmp_path: Path) -> None:
    manifest = plain.bundle.manifest
    with pytest.raises(ConfigError, match="holds no state of"):
        OffloadFile(manifest, tmp_path, manifest.bytes_per_user - 1)
    with pytest.raises(ConfigError, match="offload_precision 'int8' is not one of same, float16"):
        CacheConfig(offload_precision="int8")
    with pytest.raises(JobError, match=r"absent cannot take a file of .* No such file"):
        OffloadFile(manifest, tmp_path / "absent", 1 << 20)
    with pytest.raises(JobError, match="cannot take a file"):
        OffloadFile(manifest, tmp_path, 1 << 60)
    with pytest.raises(ConfigError, match="give both or neither"):
        CacheConfig(state_memory=1 << 20, offload=tmp_path)
    with pytest.raises(ConfigError, match="give state_memory as well"):
        CacheConfig(offload=tmp_path, offload_memory=1 << 20)


def test_what_was_driven_out_is_saved_though_the_request_fails(
    tiny_bundle: Path, users: list[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranker = offloading(tiny_bundle, tmp_path)
    capacity = ranker.cache.capacity
    for user in range(capacity):
        ask(ranker, users, user, 40)
    assert ranker.offload is not None

    def decode(*args: object) -> None:
        raise FailedError

    with monkeypatch.context() as patch:
        patch.setattr(ranker.backend, "decode", decode)
        with pytest.raises(FailedError):
            ask(ranker, users, capacity, 40)
    ranker.check_integrity()
    assert [ask(ranker, users, user, 40).result for user in range(capacity + 1)] == ["reuse"] * (capacity + 1)


def test_a_file_whose_every_slot_is_busy_costs_a_state_and_no_request(
    tiny_bundle: Path, users: list[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One slot in the file, slow writes, four threads of requests that all drive somebody out."""
    ranker = offloading(tiny_bundle, tmp_path, slots=24, room=1, compute_slots=4)
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *args: (time.sleep(0.002), write(*args))[1])
    people = [f"p{index}" for index in range(80)]

    def visit(name: str) -> str:
        return ranker.rank_batch([first_events(users[0], 40, user=name)])[0].result

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(visit, people)) == {"prefill"}
    assert ranker.cache.counts["evicted"] == len(people) - ranker.cache.capacity
    assert ranker.offload is not None
    assert len(ranker.offload) == 1
    ranker.check_integrity()
