"""States carried across anchors: only where asked for, so far and no further, with a drift that is what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onetrans.features.requests import Request
from onetrans.runtime import Ranker, Scores
from onetrans.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from parity_tests.states import Reference, cached, difference, entry_of, people, rank, rank_new, same_bits, upto


@pytest.fixture(scope="module")
def lives(backend: OnnxRuntimeCpu) -> dict[str, Request]:
    return people(backend.manifest.schema, "abcd", candidates=20)


def opened(backend: OnnxRuntimeCpu, **config: Any) -> Ranker:
    return cached(backend.bundle, backend, slots=16, **{"reuse": "stale", **config})[0]


def drift_of(ranker: Ranker, scores: Scores, request: Request) -> float:
    """Measured here: the largest difference of a logit from that of a fresh prefill."""
    return difference(scores.logits, rank_new(ranker, request).logits)


def test_the_drift_is_the_difference_from_a_fresh_prefill(
    backend: OnnxRuntimeCpu, lives: dict[str, Request], reference: Reference
) -> None:
    ranker = opened(backend, drift_every=1)
    rank(ranker, upto(lives["a"], 100))
    crossed = upto(lives["a"], 130)
    scores = rank(ranker, crossed)
    assert (scores.result, scores.fresh) == ("stale", 30)
    assert scores.drift == drift_of(ranker, scores, crossed)
    # no rounding: the state lacks what its later layers would see now
    assert scores.drift > 100 * reference.bound(scores.logits)
    assert {"append", "decode", "drift"} <= scores.seconds.keys()


def test_after_a_measured_drift_the_state_is_exact_again(backend: OnnxRuntimeCpu, lives: dict[str, Request]) -> None:
    ranker = opened(backend, drift_every=1)
    rank(ranker, upto(lives["a"], 100))
    for after in (130, 170, 195):  # two anchors crossed, each by an exact state
        crosses = after != 170
        scores = rank(ranker, upto(lives["a"], after))
        assert (scores.result, scores.drift is not None) == ("stale" if crosses else "append", crosses)
        assert entry_of(ranker, "a").crossings == 0
        ranker.check_integrity()
        again = rank(ranker, upto(lives["a"], after))
        assert (again.result, again.drift) == ("reuse", None)
        assert not crosses or same_bits(again.logits, rank_new(ranker, upto(lives["a"], after)).logits)


def test_a_drift_is_measured_where_nothing_moved_too(backend: OnnxRuntimeCpu, lives: dict[str, Request]) -> None:
    """The second stale request finds a state that was carried before; every other one is measured."""
    ranker = opened(backend, drift_every=2)
    rank(ranker, upto(lives["a"], 100))
    first, second = upto(lives["a"], 130), upto(lives["a"], 135)
    assert rank(ranker, first).drift is None
    scores = rank(ranker, second)
    assert scores.result == "stale"
    assert scores.drift == drift_of(ranker, scores, second) > 0
    assert rank(ranker, second).result == "reuse"


def test_every_so_many_stale_requests_are_measured(backend: OnnxRuntimeCpu, lives: dict[str, Request]) -> None:
    ranker = opened(backend, drift_every=3)
    measured = []
    for _ in range(9):
        rank(ranker, upto(lives["a"], 100))
        scores = rank(ranker, upto(lives["a"], 130))
        assert scores.result == "stale"
        measured.append(scores.drift is not None)
        ranker.invalidate("a")
    assert measured == [False, False, True] * 3


def test_each_user_of_a_batch_has_a_drift_of_his_own(backend: OnnxRuntimeCpu, lives: dict[str, Request]) -> None:
    ranker = opened(backend, drift_every=1)
    ranker.rank_batch([upto(lives[user], events) for user, events in zip("abcd", (100, 60, 190, 50), strict=True)])
    requests = [upto(lives[user], events) for user, events in zip("abcd", (130, 66, 200, 55), strict=True)]
    found = ranker.rank_batch(requests)
    assert [scores.result for scores in found] == ["stale", "stale", "stale", "append"]
    drifts = [scores.drift for scores in found]
    assert drifts[:3] == [drift_of(ranker, *pair) for pair in zip(found[:3], requests[:3], strict=True)]
    assert len(set(drifts[:3])) == 3
    assert drifts[3] is None
    ranker.check_integrity()
    assert [scores.result for scores in ranker.rank_batch(requests)] == ["reuse"] * 4


# (events, anchors that the state was carried across by then)
CARRIED = [(100, 0), (130, 1), (130, 1), (170, 1), (195, 2), (230, 2)]


def test_a_state_is_carried_across_so_many_anchors(
    backend: OnnxRuntimeCpu, lives: dict[str, Request], reference: Reference
) -> None:
    ranker = opened(backend, stale_crossings=2)
    for events, crossings in CARRIED:
        scores = rank(ranker, upto(lives["a"], events))
        assert scores.result == ("stale" if crossings else "prefill")
        assert entry_of(ranker, "a").crossings == crossings
        assert scores.drift is None
        ranker.check_integrity()
    last = upto(lives["a"], 258)
    scores = rank(ranker, last)
    assert scores.result == "prefill"
    reference.check_request(scores, last)
    assert entry_of(ranker, "a").crossings == 0


def test_the_windows_of_a_carried_state_are_those_of_its_length(
    backend: OnnxRuntimeCpu, lives: dict[str, Request]
) -> None:
    """Layer 0 reads events alone, so its keys and values are a fresh prefill's, those of later layers are not."""
    ranker = opened(backend)
    for events in (100, 130, 150):
        rank(ranker, upto(lives["a"], events))
    stale = ranker.pool.read(entry_of(ranker, "a").slot)
    exact_ranker = opened(backend)
    rank(exact_ranker, upto(lives["a"], 150))
    exact = exact_ranker.pool.read(entry_of(exact_ranker, "a").slot)
    assert {name: value.shape for name, value in stale.items()} == {name: v.shape for name, v in exact.items()}
    for name in ("k0", "v0"):
        # Rows that were computed together with others: a unit or so in the last place of float32.
        np.testing.assert_allclose(stale[name], exact[name], rtol=0, atol=4e-7 * np.abs(exact[name]).max())
    for name in ("k1", "v1"):
        assert np.abs(stale[name] - exact[name]).max() > 1e-3 * np.abs(exact[name]).max()


def test_without_being_asked_for_nothing_is_stale(
    backend: OnnxRuntimeCpu, lives: dict[str, Request], reference: Reference
) -> None:
    ranker = opened(backend, reuse="exact", drift_every=1)
    for events, _ in CARRIED:
        request = upto(lives["a"], events)
        scores = rank(ranker, request)
        assert scores.result != "stale"
        assert scores.drift is None
        reference.check_request(scores, request)
