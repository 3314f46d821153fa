"""What a cached state is good for: fingerprints of what it was computed from, and the four results of a lookup."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from onetrans.features.merge import merge_tokens, parse_history
from onetrans.features.windows import Pyramid
from onetrans.model.presets import preset
from onetrans.runtime.cache.fingerprint import RunningHash, context_digest
from onetrans.runtime.cache.lookup import CacheEntry, Lookup, Policy, look_up
from parity_tests.conftest import request_of

SCHEMA = preset("tiny").schema
WINDOWS = Pyramid(max_history=64, keep=(32, 4), chunk=64)
EXACT = Policy(pyramid=WINDOWS, can_append=True)
STALE = dataclasses.replace(EXACT, reuse="stale", stale_crossings=2)
INTENT = dataclasses.replace(EXACT, can_append=False)
Tokens = dict[str, np.ndarray]


def tokens_of(history: Any, merge: Any = "time") -> Tokens:
    return merge_tokens(SCHEMA, parse_history(SCHEMA, history), merge)


def history(events: int, seed: int = 0) -> dict[str, Any]:
    given: Any = request_of(SCHEMA, events=events, candidates=1, seed=seed).history
    return {**given}


LONG = history(400)
ALL = tokens_of(LONG)


def first(count: int, tokens: Tokens = ALL) -> Tokens:
    return {name: column[:count] for name, column in tokens.items()}


def columns(events: Sequence[tuple[int, int, float, tuple[int, int]]]) -> Tokens:
    rows = list(zip(*events, strict=True)) or [(), (), (), ()]
    return {
        "behaviour": np.array(rows[0], np.int64),
        "item": np.array(rows[1], np.int64),
        "price": np.array(rows[2], np.float32),
        "tags": np.array(rows[3], np.int64).reshape(len(events), 2),
    }


# Few values, so that equal prefixes are common.
EVENTS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 2), st.sampled_from([0.0, 0.5]), st.tuples(*[st.integers(0, 1)] * 2)),
    max_size=6,
)


@given(a=EVENTS, b=EVENTS, shared=EVENTS, count=st.integers(0, 12))
@example(a=[], b=[], shared=[], count=0)
@example(a=[(0, 1, 0.0, (0, 0))], b=[(1, 0, 0.0, (0, 0))], shared=[], count=1)  # the same numbers in other columns
@settings(derandomize=True, database=None, deadline=None, max_examples=300)
def test_hashes_are_equal_where_tokens_are(a: list[Any], b: list[Any], shared: list[Any], count: int) -> None:
    one, other = shared + a, shared + b
    digests = [RunningHash(columns(events)).digests(count) for events in (one, other)]
    assert (digests[0][0] == digests[1][0]) == (one[:count] == other[:count])
    assert (digests[0][1] == digests[1][1]) == (one == other)


@given(events=EVENTS, count=st.integers(0, 6))
@settings(derandomize=True, database=None, deadline=None)
def test_a_hash_of_the_first_tokens_is_that_of_a_shorter_history(events: list[Any], count: int) -> None:
    count = min(count, len(events))
    assert RunningHash(columns(events)).digests(count)[0] == RunningHash(columns(events[:count])).digests(0)[1]


def test_a_digest_of_the_context_covers_names_values_types_and_shapes() -> None:
    inputs = {"user_age": np.array([3]), "user_tags": np.array([[1, 2, 0]]), "user_days": np.array([1.5], np.float32)}
    others = [
        {**inputs, "user_age": np.array([4])},
        {**inputs, "user_age": np.array([3], np.int32)},
        {**inputs, "user_tags": np.array([[2, 1, 0]])},
        {**inputs, "user_tags": np.array([1, 2, 0])},
        {**inputs, "user_days": np.array([1.25], np.float32)},
        {"user_age": inputs["user_age"], "user_tags": inputs["user_tags"]},
        {**{n: v for n, v in inputs.items() if n != "user_age"}, "user_old": inputs["user_age"]},
    ]
    digests = [context_digest(given) for given in (inputs, *others)]
    assert len(set(digests)) == len(digests)
    assert context_digest(dict(reversed(inputs.items()))) == digests[0]
    assert context_digest({name: value.copy() for name, value in inputs.items()}) == digests[0]


def state_of(tokens: Tokens, context: bytes = b"profile", **changes: Any) -> CacheEntry:
    running = RunningHash(tokens)
    entry = CacheEntry(slot=0, tokens=running.tokens, events=running.digests(0)[1], context=context)
    return dataclasses.replace(entry, **changes)


def look(entry: CacheEntry | None, tokens: Tokens, policy: Policy = EXACT, context: bytes = b"profile") -> Lookup:
    found = look_up(policy, entry, RunningHash(tokens), context)
    assert (found.tokens, found.events) == (len(tokens["behaviour"]), RunningHash(tokens).digests(0)[1])
    assert (found.entry is None) == (found.kind == "prefill")
    assert found.fresh == found.tokens - (found.entry.tokens if found.entry else 0)
    assert any(found.dropped) <= (found.kind == "stale")
    return found


@pytest.mark.parametrize("events", [0, 1, 63, 64, 400])
@pytest.mark.parametrize("policy", [EXACT, STALE, INTENT], ids=["exact", "stale", "intent"])
def test_the_same_history_is_a_reuse(events: int, policy: Policy) -> None:
    found = look(state_of(first(events)), first(events), policy)
    assert (found.kind, found.fresh, found.recompute, found.crossings) == ("reuse", 0, False, 0)


@pytest.mark.parametrize(("old", "new"), [(1, 2), (1, 63), (63, 63), (64, 127), (100, 101), (320, 383)])
def test_a_longer_history_is_an_append_while_the_anchor_stands(old: int, new: int) -> None:
    found = look(state_of(first(old)), first(new))
    assert (found.kind, found.fresh, found.recompute) == ("append" if new > old else "reuse", new - old, new > old)


@pytest.mark.parametrize(("old", "new"), [(63, 64), (1, 64), (127, 128), (64, 400), (383, 384)])
def test_a_crossed_anchor_is_a_prefill(old: int, new: int) -> None:
    found = look(state_of(first(old)), first(new))
    assert (found.kind, found.fresh, found.crossings) == ("prefill", new, 0)


def test_a_user_without_a_state_or_without_events_is_prefilled() -> None:
    assert look(None, first(5)).kind == "prefill"
    assert look(state_of(first(0)), first(1)).kind == "prefill"
    assert look(state_of(first(0)), first(0), context=b"other").kind == "prefill"


def test_another_context_makes_only_what_depends_on_it_anew() -> None:
    same = look(state_of(first(50)), first(50), context=b"other")
    assert (same.kind, same.fresh, same.recompute) == ("reuse", 0, True)
    grown = look(state_of(first(50)), first(60), context=b"other")
    assert (grown.kind, grown.fresh, grown.recompute) == ("append", 10, True)


def test_a_bundle_without_append_reuses_or_prefills() -> None:
    assert look(state_of(first(50)), first(50), INTENT).kind == "reuse"
    assert look(state_of(first(50)), first(51), INTENT).kind == "prefill"
    assert look(state_of(first(50)), first(50), INTENT, context=b"other").kind == "prefill"


def replaced(name: str, index: int, value: Any) -> dict[str, Any]:
    column = np.array(LONG[name])
    column[index] = value
    return {**LONG, name: column.tolist() if name == "behaviour" else column}


def without(index: int) -> dict[str, Any]:
    keep = [i for i in range(400) if i != index]
    return {
        name: [column[i] for i in keep] if isinstance(column, list) else column[keep] for name, column in LONG.items()
    }


OTHER_BEHAVIOUR = next(name for name in SCHEMA.behaviours if name != LONG["behaviour"][20])
CHANGED_PASTS = {
    "item-of-the-first": replaced("item_id", 0, (LONG["item_id"][0] + 1) % 2001),
    "item-of-the-last": replaced("item_id", 69, (LONG["item_id"][69] + 1) % 2001),
    "price": replaced("price", 30, np.nextafter(LONG["price"][30], np.float32(9))),
    "behaviour": {**replaced("behaviour", 20, OTHER_BEHAVIOUR)},
    "first-removed": without(0),
    "middle-removed": without(40),
    "last-removed": without(69),
}


@pytest.mark.parametrize("changed", CHANGED_PASTS.values(), ids=CHANGED_PASTS)
@pytest.mark.parametrize("policy", [EXACT, STALE], ids=["exact", "stale"])
@pytest.mark.parametrize("events", [70, 75, 140])
def test_another_past_is_a_prefill(changed: dict[str, Any], policy: Policy, events: int) -> None:
    assert look(state_of(first(70)), first(events, tokens_of(changed)), policy).kind == "prefill"


def test_a_change_behind_the_state_is_no_other_past() -> None:
    assert look(state_of(first(70)), first(75, tokens_of(replaced("item_id", 70, 1)))).kind == "append"


def test_a_shorter_history_is_a_prefill() -> None:
    assert look(state_of(first(70)), first(69)).kind == "prefill"
    assert look(state_of(first(70)), first(0)).kind == "prefill"


def test_events_of_one_time_in_another_order_are_another_past() -> None:
    tied = history(40)
    tied["timestamp"] = np.array(tied["timestamp"])
    tied["timestamp"][10] = tied["timestamp"][11]
    swap = [*range(10), 11, 10, *range(12, 40)]
    swapped = {n: [c[i] for i in swap] if isinstance(c, list) else c[swap] for n, c in tied.items()}
    assert look(state_of(tokens_of(tied)), tokens_of(swapped)).kind == "prefill"


def test_times_that_move_but_keep_the_order_change_nothing() -> None:
    """Time is no input of the model: only the order of the tokens is left of it."""
    times = np.array(LONG["timestamp"])
    for moved in (times + 86_400, times[0] + 3 * (times - times[0]), np.arange(400)):
        assert look(state_of(first(70)), first(70, tokens_of({**LONG, "timestamp": moved}))).kind == "reuse"


def test_a_stale_state_is_carried_only_where_asked_for_and_so_far() -> None:
    entry = state_of(first(100))
    assert look(entry, first(130)).kind == "prefill"
    found = look(entry, first(130), STALE)
    assert (found.kind, found.fresh, found.recompute, found.crossings) == ("stale", 30, True, 1)
    assert found.dropped == (64, 64)  # starts (0, 32) at 100 events, (64, 96) at 130
    assert look(entry, first(191), STALE).crossings == 1
    assert look(state_of(first(60)), first(64), STALE).dropped == (0, 32)
    assert look(state_of(first(60), crossings=1), first(64), STALE).crossings == 2
    assert look(state_of(first(60), crossings=2), first(64), STALE).kind == "prefill"


def test_a_state_stays_stale_until_it_is_prefilled() -> None:
    entry = state_of(first(130), crossings=1)
    same, grown = look(entry, first(130), STALE), look(entry, first(131), STALE)
    assert (same.kind, same.recompute, same.dropped, same.crossings) == ("stale", False, (0, 0), 1)
    assert (grown.kind, grown.recompute, grown.dropped, grown.crossings) == ("stale", True, (0, 0), 1)
    assert look(entry, first(130), EXACT).kind == "prefill"


@pytest.mark.parametrize(("old", "new"), [(64, 192), (96, 128), (70, 400)])
def test_a_stale_state_that_would_lose_a_whole_window_is_prefilled(old: int, new: int) -> None:
    """Of 96 tokens layer 1 of 128 would keep none: its keys start at 96."""
    patient = dataclasses.replace(STALE, stale_crossings=100)
    assert max(WINDOWS.starts(new)) >= old
    assert look(state_of(first(old)), first(new), patient).kind == "prefill"
