"""The slots: how many, what is written where, what is bit-equal, and that a failed computation leaves no trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from onetrans.errors import StateError
from onetrans.features.requests import Request
from onetrans.runtime import Ranker
from onetrans.runtime.backends.base import BackendOptions
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.cache.config import CacheConfig
from onetrans.runtime.pools.host import HostPool
from parity_tests.states import (
    Reference,
    Watched,
    cached,
    contents,
    difference,
    entry_of,
    people,
    rank,
    rank_new,
    same_bits,
    same_contents,
    upto,
)

NAMES = "abcdefgh"


@pytest.fixture(scope="module")
def opened(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def backend(opened: Bundle) -> Watched:
    return Watched(opened, BackendOptions(threads=1))


@pytest.fixture(autouse=True)
def nothing_fails(backend: Watched) -> Iterator[None]:
    yield
    backend.ran = lambda graph: None


@pytest.fixture(scope="module")
def lives(opened: Bundle) -> dict[str, Request]:
    return people(opened.manifest.schema, NAMES)


def raw(pool: HostPool, slot: int) -> dict[str, np.ndarray]:
    """Every byte of a slot, rows behind the valid ones too."""
    return {name: slab[slot].copy() for name, slab in pool.slabs.items()}


def test_the_pool_takes_the_memory_it_is_given_and_no_more(opened: Bundle, backend: Watched) -> None:
    one = opened.manifest.bytes_per_user
    ranker = Ranker(opened, backend, CacheConfig(state_memory=12 * one + one // 2))
    assert isinstance(ranker.pool, HostPool)
    assert ranker.pool.slots == ranker.cache.slots == 12
    assert ranker.pool.nbytes == 12 * one == sum(slab.nbytes for slab in ranker.pool.slabs.values())
    assert all(len(slab) == 12 for slab in ranker.pool.slabs.values())
    assert one == sum(slab[0].nbytes for slab in ranker.pool.slabs.values())


def test_slabs_stay_where_they_are(opened: Bundle, backend: Watched, lives: dict[str, Request]) -> None:
    ranker, pool = cached(opened, backend, slots=6)
    before = {name: (slab.ctypes.data, slab.nbytes) for name, slab in pool.slabs.items()}
    rng = np.random.default_rng(0)
    for _ in range(200):
        rank(ranker, upto(lives[rng.choice(list(NAMES))], int(rng.integers(0, 400)), 1))
    assert ranker.cache.counts["evicted"] > 20
    assert {name: (slab.ctypes.data, slab.nbytes) for name, slab in pool.slabs.items()} == before


@pytest.mark.parametrize(("old", "new"), [(1, 2), (70, 90), (70, 127), (390, 400)])
def test_an_append_writes_behind_what_is_there(
    opened: Bundle, backend: Watched, lives: dict[str, Request], old: int, new: int
) -> None:
    ranker, pool = cached(opened, backend, slots=8)
    rank(ranker, upto(lives["b"], 50))
    rank(ranker, upto(lives["a"], old))
    slot = entry_of(ranker, "a").slot
    before = [raw(pool, s) for s in range(pool.slots)]
    assert rank(ranker, upto(lives["a"], new)).result == "append"
    assert entry_of(ranker, "a").slot == slot
    starts = opened.manifest.pyramid.key_starts(new)
    for name, tensor in pool.tensors.items():
        if not tensor.is_window:
            continue
        first, last = old - starts[tensor.state.layer], new - starts[tensor.state.layer]
        assert np.array_equal(pool.slabs[name][slot, :first], before[slot][name][:first]), name
        assert not np.array_equal(pool.slabs[name][slot, first:last], before[slot][name][first:last]), name
        assert np.array_equal(pool.slabs[name][slot, last:], before[slot][name][last:]), name
    assert pool.lengths(slot).tolist() == [new - start for start in starts]
    for other in set(range(pool.slots)) - {slot}:
        assert same_bits(raw(pool, other), before[other])


def test_a_prefill_goes_to_another_slot_and_frees_the_old_one(
    opened: Bundle, backend: Watched, lives: dict[str, Request]
) -> None:
    ranker, pool = cached(opened, backend, slots=2)  # so the one slot that is free now takes the next prefill
    slots = []
    for events in (70, 130, 200):
        before = raw(pool, slots[-1]) if slots else {}
        assert rank(ranker, upto(lives["a"], events)).result == "prefill"
        assert not slots or same_bits(raw(pool, slots[-1]), before)
        slots.append(entry_of(ranker, "a").slot)
    assert slots[0] == slots[2] != slots[1]


@pytest.mark.parametrize("events", [0, 1, 63, 64, 100, 193, 400])
def test_where_scores_are_bit_equal(
    opened: Bundle, backend: Watched, lives: dict[str, Request], reference: Reference, events: int
) -> None:
    """A first prefill and every reuse, each request alone, are bit-equal to a fresh prefill.

    An append is not in general: ONNX Runtime sums matrices of another height in another order. It is within the bound.
    """
    ranker, _ = cached(opened, backend, slots=8)
    request = upto(lives["a"], events, 3)
    fresh = rank_new(ranker, request)
    for result in ("prefill", "reuse", "reuse"):
        scores = rank(ranker, request)
        assert scores.result == result
        assert same_bits(scores.logits, fresh.logits)
    rank(ranker, upto(lives["b"], max(events - 1, events // 64 * 64)))
    other = upto(lives["b"], events, 3)
    grown = rank(ranker, other)
    reference.check_request(grown, other)
    print(f"{events} events, {grown.result}: {same_bits(grown.logits, rank_new(ranker, other).logits)}")


@pytest.mark.parametrize("events", [1, 64, 100, 400])
def test_another_context_is_taken_over_without_a_prefill(
    opened: Bundle, backend: Watched, lives: dict[str, Request], reference: Reference, events: int
) -> None:
    ranker, pool = cached(opened, backend, slots=8)
    request = upto(lives["a"], events)
    rank(ranker, request)
    before = pool.read(entry_of(ranker, "a").slot)
    other = dataclasses.replace(request, profile=lives["b"].profile)
    scores = rank(ranker, other)
    assert (scores.result, scores.fresh) == ("reuse", 0)
    reference.check_request(scores, other)
    # far beyond any rounding: the context matters, so an old one would show
    assert difference(scores.logits, rank_new(ranker, request).logits) > 1e-3
    after = pool.read(entry_of(ranker, "a").slot)
    assert all(np.array_equal(after[n], before[n]) for n, tensor in pool.tensors.items() if tensor.is_window)
    print(f"{events} events, other context: {same_bits(scores.logits, rank_new(ranker, other).logits)}")


def corrupt_lengths(ranker: Ranker, pool: HostPool) -> None:
    pool.slabs["lengths"][entry_of(ranker, "a").slot, -1] += 1


def corrupt_tokens(ranker: Ranker, pool: HostPool) -> None:
    key, entry = next(iter(ranker.cache.entries().items()))
    ranker.cache._entries[key] = dataclasses.replace(entry, tokens=entry.tokens + 1)


@pytest.mark.parametrize("corrupt", [corrupt_lengths, corrupt_tokens])
def test_a_state_whose_windows_do_not_fit_its_events_is_noticed(
    opened: Bundle, backend: Watched, lives: dict[str, Request], corrupt
) -> None:
    ranker, pool = cached(opened, backend, slots=4)
    rank(ranker, upto(lives["a"], 100))
    ranker.check_integrity()
    corrupt(ranker, pool)
    with pytest.raises(StateError, match="the state of user 'a' has windows of"):
        ranker.check_integrity()


class FailedError(Exception):
    """Raised in the middle of the backend's work."""


def fail(backend: Watched, graph: str, run: int = 1) -> None:
    """From now on the given run of a graph fails, once it has written its outputs."""
    runs = {graph: 0}

    def ran(name: str) -> None:
        runs[name] = runs.get(name, 0) + 1
        if name == graph and runs[name] == run:
            raise FailedError

    backend.ran = ran


def fails(ranker: Ranker, backend: Watched, requests: list[Request], graph: str, run: int = 1) -> None:
    fail(backend, graph, run)
    with pytest.raises(FailedError):
        ranker.rank_batch(requests)
    backend.ran = lambda graph: None
    ranker.check_integrity()


def warm(opened: Bundle, backend: Watched, lives: dict[str, Request], **config: object) -> Ranker:
    """Users a, b and c with 70, 100 and 330 events cached."""
    ranker, _ = cached(opened, backend, slots=16, **config)
    for user, events in zip("abc", (70, 100, 330), strict=True):
        rank(ranker, upto(lives[user], events))
    return ranker


def ranks_right(ranker: Ranker, reference: Reference, requests: list[Request], kinds: list[str]) -> None:
    found = ranker.rank_batch(requests)
    assert [scores.result for scores in found] == kinds
    for request, scores in zip(requests, found, strict=True):
        reference.check_request(scores, request)
    ranker.check_integrity()


@pytest.mark.parametrize("run", [1, 2])
def test_a_failed_prefill_leaves_no_trace(
    opened: Bundle, backend: Watched, lives: dict[str, Request], reference: Reference, run: int
) -> None:
    """Two graph runs: the windows of 400 and 130 events, then that of 5, which fails once the first are stored."""
    ranker = warm(opened, backend, lives)
    before, states = ranker.cache.entries(), contents(ranker)
    requests = [upto(lives["d"], 400), upto(lives["b"], 130), upto(lives["e"], 5), upto(lives["a"], 75)]
    fails(ranker, backend, requests, "prefill", run)
    assert ranker.cache.entries() == before
    assert same_contents(contents(ranker), states)
    ranks_right(ranker, reference, requests, ["prefill", "prefill", "prefill", "append"])


@pytest.mark.parametrize("run", [1, 2])
def test_a_failed_append_leaves_the_states_as_they_were(
    opened: Bundle, backend: Watched, lives: dict[str, Request], reference: Reference, run: int
) -> None:
    """Two graph runs, of 20 new events and of 2; what was prefilled in the same pass is whole and stays."""
    ranker = warm(opened, backend, lives)
    before, states = ranker.cache.entries(), contents(ranker)
    requests = [upto(lives["a"], 90), upto(lives["b"], 102), upto(lives["d"], 5), upto(lives["c"], 330)]
    fails(ranker, backend, requests, "append", run)
    after, kept = ranker.cache.entries(), contents(ranker)
    new = next(key for key in after if key[1] == "d")
    assert {key: entry for key, entry in after.items() if key != new} == before
    del kept[new]
    assert same_contents(kept, states)
    ranks_right(ranker, reference, requests, ["append", "append", "reuse", "reuse"])


def test_a_failed_decode_leaves_whole_states(
    opened: Bundle, backend: Watched, lives: dict[str, Request], reference: Reference
) -> None:
    """What was computed before it is whole, so it stays; what was only read is as it was."""
    ranker = warm(opened, backend, lives)
    before, states = ranker.cache.entries(), contents(ranker)
    reused = [upto(lives["a"], 70), upto(lives["b"], 100)]
    fails(ranker, backend, reused, "decode")
    assert ranker.cache.entries() == before
    assert same_contents(contents(ranker), states)
    computed = [upto(lives["a"], 71), upto(lives["b"], 130), upto(lives["d"], 5)]
    fails(ranker, backend, computed, "decode")
    assert entry_of(ranker, "c") == next(entry for (_, user), entry in before.items() if user == "c")
    ranks_right(ranker, reference, computed, ["reuse", "reuse", "reuse"])


@pytest.mark.parametrize("graph", ["append", "decode", "prefill"])
def test_a_failed_stale_request_leaves_the_exact_state(
    opened: Bundle, backend: Watched, lives: dict[str, Request], graph: str
) -> None:
    """Its windows are moved in another slot; the prefill is that of the drift."""
    ranker = warm(opened, backend, lives, reuse="stale", drift_every=1)
    before, states = ranker.cache.entries(), contents(ranker)
    fails(ranker, backend, [upto(lives["b"], 130)], graph)
    assert ranker.cache.entries() == before
    assert same_contents(contents(ranker), states)
    assert rank(ranker, upto(lives["b"], 130)).result == "stale"


def test_failures_without_a_cache_give_the_slots_back(
    opened: Bundle, backend: Watched, lives: dict[str, Request]
) -> None:
    ranker = Ranker(opened, backend, CacheConfig(compute_slots=2))
    for graph in ("prefill", "decode", "prefill"):
        fails(ranker, backend, [upto(lives["a"], 10), upto(lives["b"], 10)], graph)
    assert len(ranker.rank_batch([upto(lives[user], 10) for user in "ab"])) == 2
