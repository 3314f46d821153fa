"""Batches, bad input, reloads and intent-ordered bundles: what the cache does around the states themselves."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from onetrans.errors import BundleError, ConfigError, DataError
from onetrans.features.requests import Request
from onetrans.model.onetrans import OneTrans
from onetrans.runtime import Ranker
from onetrans.runtime.backends.base import BackendOptions
from onetrans.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.cache.config import CacheConfig
from parity_tests.conftest import rehash
from parity_tests.states import (
    Reference,
    cached,
    contents,
    difference,
    people,
    rank,
    rank_new,
    retrained,
    same_bits,
    same_contents,
    upto,
)

NAMES = [f"user{n}" for n in range(10)]


@pytest.fixture(scope="module")
def lives(backend: OnnxRuntimeCpu) -> dict[str, Request]:
    return people(backend.manifest.schema, NAMES, candidates=200)


@pytest.fixture
def ranker(backend: OnnxRuntimeCpu) -> Ranker:
    return cached(backend.bundle, backend, slots=16, compute_slots=3)[0]


# --- batches


def rounds(lives: dict[str, Request]) -> list[list[Request]]:
    """Four batches of ten users, three of them unnamed, in another order each time."""
    rng = np.random.default_rng(0)
    events = dict(zip(NAMES, (0, 1, 5, 63, 64, 65, 130, 191, 300, 350), strict=True))
    counts = (1, 200, 2, 33, 64, 7, 1, 120, 3, 10)
    batches = []
    for _ in range(4):
        order = rng.permutation(NAMES).tolist()
        batch = [upto(lives[user], events[user], count) for user, count in zip(order, counts, strict=True)]
        unnamed = dict.fromkeys(NAMES[::4], "")
        batches.append(
            [dataclasses.replace(request, user=unnamed.get(request.user, request.user)) for request in batch]
        )
        events = {user: count + int(rng.integers(0, 15)) for user, count in events.items()}
    return batches


def test_a_batch_gives_what_each_gets_alone_in_the_order_given(
    ranker: Ranker, backend: OnnxRuntimeCpu, lives: dict[str, Request], reference: Reference
) -> None:
    """Ten users in passes of three. Both ways are within the reference's bound, and so their order is right."""
    alone = cached(backend.bundle, backend, slots=16)[0]
    kinds = set()
    for batch in rounds(lives):
        together = ranker.rank_batch(batch)
        ranker.check_integrity()
        singly = [rank(alone, request) for request in batch]
        assert [scores.result for scores in together] == [scores.result for scores in singly]
        assert [scores.fresh for scores in together] == [scores.fresh for scores in singly]
        for request, scores, single in zip(batch, together, singly, strict=True):
            gold = reference.gold(request)
            reference.check(scores.logits, gold)
            reference.check(single.logits, gold)
        kinds.update(scores.result for scores in together)
    assert kinds == {"prefill", "append", "reuse"}
    assert {user for _, user in ranker.cache.entries()} == set(NAMES) - set(NAMES[::4])


def test_an_empty_batch_has_no_scores(ranker: Ranker) -> None:
    assert ranker.rank_batch([]) == []


def test_unnamed_users_leave_nothing_behind(ranker: Ranker, lives: dict[str, Request]) -> None:
    request = dataclasses.replace(upto(lives["user0"], 50, 3), user="")
    for _ in range(2):
        assert [scores.result for scores in ranker.rank_batch([request, request])] == ["prefill", "prefill"]
    assert ranker.cache.entries() == {}


# --- bad input


def backwards(request: Request) -> Request:
    times = np.array(cast(dict[str, Any], request.history)["timestamp"])[::-1]
    return dataclasses.replace(request, history={**cast(dict[str, Any], request.history), "timestamp": times})


def with_price(request: Request, price: float) -> Request:
    prices = np.full(len(cast(dict[str, Any], request.candidates)["price"]), price)
    return dataclasses.replace(request, candidates={**cast(dict[str, Any], request.candidates), "price": prices})


def repeated(request: Request) -> Request:
    return dataclasses.replace(
        request,
        candidates={name: np.repeat(v, 700, axis=0) for name, v in cast(dict[str, Any], request.candidates).items()},
    )


BAD: dict[str, tuple[Callable[[Request], Request], str]] = {
    "history goes back": (backwards, "request 4: history: timestamp of event "),
    "a price is nan": (
        lambda request: with_price(request, float("nan")),
        "request 4: candidates: price of candidate 0",
    ),
    "no profile": (lambda request: dataclasses.replace(request, profile={}), "request 4: profile: "),
    "too many candidates": (repeated, "request 4: 2100 candidates were given; this bundle takes 1 to 2048"),
    "a user twice": (
        lambda request: dataclasses.replace(request, user="user1"),
        "user 'user1' stands in requests 1 and 4 of one batch; a batch takes one request of each user: join their"
        " candidates, or rank them one after another",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_one_bad_request_of_a_batch_is_named_and_nothing_is_ranked(
    ranker: Ranker, lives: dict[str, Request], spoil: Callable[[Request], Request], message: str
) -> None:
    """It stands in the second pass, so a check that comes late would have ranked the first."""
    ranker.rank_batch([upto(lives[user], 70, 3) for user in NAMES[:5]])
    before, states = ranker.cache.entries(), contents(ranker)
    batch = [upto(lives[user], 90, 3) for user in NAMES[:6]]
    batch[4] = spoil(batch[4])
    with pytest.raises(DataError) as caught:
        ranker.rank_batch(batch)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert list(ranker.cache.entries().items()) == list(before.items())
    assert same_contents(contents(ranker), states)
    ranker.check_integrity()


def test_a_single_bad_request_touches_nothing(ranker: Ranker, lives: dict[str, Request]) -> None:
    rank(ranker, upto(lives["user0"], 70, 3))
    rank(ranker, upto(lives["user1"], 70, 3))
    before = list(ranker.cache.entries().items())
    with pytest.raises(DataError, match=r"^history: timestamp"):
        rank(ranker, backwards(upto(lives["user0"], 80, 3)))
    assert list(ranker.cache.entries().items()) == before


def test_memory_for_less_than_two_users_is_refused(tiny_bundle: Path, backend: OnnxRuntimeCpu) -> None:
    one = backend.manifest.bytes_per_user
    with pytest.raises(ConfigError, match=f"^state memory of {2 * one - 1} bytes holds 1 users of {one} bytes; give"):
        Ranker.open(tiny_bundle, cache=CacheConfig(state_memory=2 * one - 1))


# --- reload


def set_precision(body: dict[str, Any]) -> None:
    body["precision"] = "float16"


def set_windows(body: dict[str, Any]) -> None:
    body["pyramid"]["chunk"] = 32


def set_state(body: dict[str, Any]) -> None:
    tensor = next(
        tensor for tensor in body["state"] if tensor["window"] is None and tensor["spec"]["dtype"] == "float32"
    )
    body["bytes_per_user"] += 4 * (8 - tensor["spec"]["dims"][-1]) * int(np.prod(tensor["spec"]["dims"][1:-1]))
    tensor["spec"]["dims"][-1] = 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_precision, "its precision differs (float16, not float32); open a Ranker of its own for it"),
        (set_windows, "its pyramid differs; open a Ranker of its own for it"),
        (set_state, "its state differs; open a Ranker of its own for it"),
    ],
    ids=["precision", "windows", "state"],
)
def test_a_bundle_whose_states_are_others_cannot_take_over(
    ranker: Ranker, lives: dict[str, Request], bundle: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    assert_refused(ranker, lives, bundle, lambda: rehash(bundle, change), message)


@pytest.mark.slow
def test_another_model_cannot_take_over(ranker: Ranker, lives: dict[str, Request], intent_bundle: Path) -> None:
    assert_refused(ranker, lives, intent_bundle, lambda: None, "its state differs; open a Ranker of its own for it")


def test_what_is_no_bundle_cannot_take_over(ranker: Ranker, lives: dict[str, Request], bundle: Path) -> None:
    assert_refused(ranker, lives, bundle, lambda: shutil.rmtree(bundle), "does not exist; give the folder")


def assert_refused(
    ranker: Ranker, lives: dict[str, Request], path: Path, spoil: Callable[[], object], message: str
) -> None:
    request = upto(lives["user0"], 70, 3)
    scores = rank(ranker, request)
    before, states, version = ranker.cache.entries(), contents(ranker), ranker.bundle
    spoil()
    with pytest.raises(BundleError) as caught:
        ranker.reload(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ranker.bundle is version
    assert ranker.cache.entries() == before
    assert same_contents(contents(ranker), states)
    again = rank(ranker, request)
    assert again.result == "reuse"
    assert same_bits(again.logits, scores.logits)


def test_states_of_other_weights_are_never_used(tiny_bundle: Path, lives: dict[str, Request], tmp_path: Path) -> None:
    newer = retrained(tiny_bundle, tmp_path / "newer")
    one = Bundle.open(tiny_bundle).manifest.bytes_per_user
    ranker = Ranker.open(tiny_bundle, options=BackendOptions(threads=1), cache=CacheConfig(state_memory=16 * one))
    old = [rank(ranker, upto(lives[user], 70, 5)) for user in NAMES]
    ranker.reload(newer)
    assert ranker.cache.entries() == {}
    assert ranker.bundle.path == newer
    fresh = Ranker.open(newer, options=BackendOptions(threads=1))
    for user, before in zip(NAMES, old, strict=True):
        request = upto(lives[user], 75, 5)
        scores = rank(ranker, request)
        assert scores.result == "prefill"
        expected = rank_new(fresh, request).logits
        assert same_bits(scores.logits, expected)
        assert difference(rank_new(fresh, upto(request, 70)).logits, before.logits) > 1e-3  # the weights do differ
    ranker.check_integrity()
    ranker.reload(tiny_bundle)
    assert [rank(ranker, upto(lives[user], 70, 5)).result for user in NAMES] == ["prefill"] * 10
    assert same_bits(rank(ranker, upto(lives["user0"], 70, 5)).logits, old[0].logits)


def test_a_request_under_way_leaves_no_state_of_the_old_version(
    tiny_bundle: Path, lives: dict[str, Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = retrained(tiny_bundle, tmp_path / "newer")
    one = Bundle.open(tiny_bundle).manifest.bytes_per_user
    ranker = Ranker.open(tiny_bundle, options=BackendOptions(threads=1), cache=CacheConfig(state_memory=4 * one))
    prefill, reloads = ranker.backend.prefill, []

    def reload_first(*args: Any) -> Any:
        ranker.reload(newer)
        reloads.append(newer)
        return prefill(*args)

    monkeypatch.setattr(ranker.backend, "prefill", reload_first)
    rank(ranker, upto(lives["user0"], 70, 3))
    assert reloads == [newer]
    assert ranker.cache.entries() == {}  # what the request made after the reload is of the old version
    ranker.check_integrity()


def test_the_same_bundle_again_keeps_its_states(ranker: Ranker, lives: dict[str, Request], bundle: Path) -> None:
    rank(ranker, upto(lives["user0"], 70, 3))
    ranker.reload(bundle)
    assert rank(ranker, upto(lives["user0"], 75, 3)).result == "append"


# --- intent-ordered bundles


@pytest.mark.slow
def test_an_intent_ordered_bundle_reuses_or_prefills(intent_model: OneTrans, intent_bundle: Path) -> None:
    reference = Reference(intent_model)
    opened = Bundle.open(intent_bundle)
    assert "append" not in opened.manifest.graphs
    ranker, pool = cached(opened, OnnxRuntimeCpu(opened, BackendOptions(threads=1)), slots=12)
    assert pool.nbytes == 12 * opened.manifest.bytes_per_user == sum(slab.nbytes for slab in pool.slabs.values())
    users = people(opened.manifest.schema, "abc", events=100)
    for events in (1, 2, 20, 40, 63, 64, 65, 100):
        for user in "abc":
            request = upto(users[user], events)
            other = dataclasses.replace(request, profile=users["cab"["abc".index(user)]].profile)
            for given, expected in ((request, "prefill"), (request, "reuse"), (other, "prefill")):
                scores = rank(ranker, given)
                assert scores.result == expected
                reference.check_request(scores, given)
            ranker.check_integrity()
    longer = [upto(users[user], 100) for user in "abc"]
    assert [scores.result for scores in ranker.rank_batch(longer)] == ["prefill"] * 3
    assert [scores.result for scores in ranker.rank_batch(longer)] == ["reuse"] * 3


@pytest.mark.slow
def test_stale_reuse_of_an_intent_ordered_bundle_is_no_reuse(intent_bundle: Path) -> None:
    opened = Bundle.open(intent_bundle)
    ranker, _ = cached(
        opened, OnnxRuntimeCpu(opened, BackendOptions(threads=1)), slots=12, reuse="stale", drift_every=1
    )
    (life,) = people(opened.manifest.schema, "a", events=100).values()
    results = [rank(ranker, upto(life, events)).result for events in (10, 10, 20, 70, 70)]
    assert results == ["prefill", "reuse", "prefill", "prefill", "reuse"]
