"""Histories at the border, and their merging into tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onetrans.errors import ConfigError, DataError
from onetrans.features.merge import merge_tokens, parse_history
from onetrans.features.schema import Feature, FeatureSchema

SCHEMA = FeatureSchema(
    behaviours=("purchase", "cart", "click"),
    event=(
        Feature(name="item_id", kind="categorical", vocab=1000, dim=4),
        Feature(name="price", kind="numeric"),
        Feature(name="tags", kind="multi", vocab=20, dim=2, width=3),
    ),
    user=(Feature(name="age", kind="categorical", vocab=9, dim=2),),
    candidate=(Feature(name="item_id", kind="categorical", vocab=1000, dim=4),),
)


def event(behaviour: str, timestamp: float, item_id: int, tags: tuple[int, ...] = ()) -> dict[str, Any]:
    return {
        "behaviour": behaviour,
        "timestamp": timestamp,
        "item_id": item_id,
        "price": item_id / 2,
        "tags": list(tags),
    }


EVENTS = [
    event("click", 10, 1, (4,)),
    event("click", 30, 2, (4, 5, 6)),
    event("purchase", 20, 3),
    event("cart", 10, 4, (7,)),
    event("click", 30, 5),
]


def columns_of(events: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: [event[name] for event in events] for name in EVENTS[0]}


def as_arrays(events: list[dict[str, Any]]) -> dict[str, Any]:
    columns = columns_of(events)
    width = max((len(tags) for tags in columns["tags"]), default=0)
    columns["tags"] = np.array([tags + [0] * (width - len(tags)) for tags in columns["tags"]])
    return {name: np.array(column) for name, column in columns.items()}


@pytest.mark.parametrize("form", [list, columns_of, as_arrays], ids=["mappings", "columns", "arrays"])
def test_every_form_parses_alike(form: Any) -> None:
    parsed = parse_history(SCHEMA, form(EVENTS))
    assert parsed["behaviour"].tolist() == [2, 2, 0, 1, 2]
    assert parsed["timestamp"].tolist() == [10, 30, 20, 10, 30]
    assert parsed["item_id"].tolist() == [1, 2, 3, 4, 5]
    assert parsed["price"].tolist() == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert parsed["tags"].tolist() == [[4, 0, 0], [4, 5, 6], [0, 0, 0], [7, 0, 0], [0, 0, 0]]
    assert [parsed[name].dtype for name in parsed] == [np.int64, np.int64, np.int64, np.float32, np.int64]
    again = parse_history(SCHEMA, parsed)
    assert all(np.array_equal(again[name], parsed[name]) for name in parsed)


def test_fractional_seconds_stay() -> None:
    parsed = parse_history(SCHEMA, [event("click", 1.25, 1), event("click", 1.5, 2)])
    assert parsed["timestamp"].tolist() == [1.25, 1.5]


def test_time_merge_sorts_and_keeps_ties() -> None:
    tokens = merge_tokens(SCHEMA, parse_history(SCHEMA, EVENTS), "time")
    assert tokens["item_id"].tolist() == [1, 4, 3, 2, 5]
    assert tokens["behaviour"].tolist() == [2, 1, 0, 2, 2]
    assert "timestamp" not in tokens


def test_intent_merge_separates_behaviours() -> None:
    tokens = merge_tokens(SCHEMA, parse_history(SCHEMA, EVENTS), "intent")
    assert tokens["behaviour"].tolist() == [0, 4, 1, 5, 2, 2, 2]
    assert tokens["item_id"].tolist() == [3, 0, 4, 0, 1, 2, 5]
    assert tokens["price"].tolist() == [1.5, 0.0, 2.0, 0.0, 0.5, 1.0, 2.5]
    assert tokens["tags"][1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("behaviours", "expected"),
    [
        pytest.param(["click"], [2], id="one-behaviour-no-sep"),
        pytest.param(["click", "purchase"], [0, 5, 2], id="absent-cart-no-sep"),
        pytest.param(["cart", "click"], [1, 5, 2], id="no-sep-before-first"),
    ],
)
def test_sep_only_between_present_behaviours(behaviours: list[str], expected: list[int]) -> None:
    events = [event(name, time, 1 + time) for time, name in enumerate(behaviours)]
    assert merge_tokens(SCHEMA, parse_history(SCHEMA, events), "intent")["behaviour"].tolist() == expected


@pytest.mark.parametrize("merge", ["time", "intent"])
@pytest.mark.parametrize("empty", [[], {}, columns_of([])], ids=["list", "mapping", "columns"])
def test_empty_history_has_no_token(empty: Any, merge: Any) -> None:
    tokens = merge_tokens(SCHEMA, parse_history(SCHEMA, empty), merge)
    assert {name: column.shape for name, column in tokens.items()} == {
        "behaviour": (0,),
        "item_id": (0,),
        "price": (0,),
        "tags": (0, 3),
    }
    assert [column.dtype for column in tokens.values()] == [np.int64, np.int64, np.float32, np.int64]


def test_unknown_merge() -> None:
    with pytest.raises(ConfigError, match="merge 'random' is not one of time, intent"):
        merge_tokens(SCHEMA, parse_history(SCHEMA, EVENTS), "random")  # type: ignore[arg-type]


histories = st.lists(st.tuples(st.sampled_from(SCHEMA.behaviours), st.integers(0, 6)), max_size=40)


def in_order(drawn: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """Events with item ids in the order given, each behaviour's times ascending, behaviours interleaved."""
    times = {name: iter(sorted(t for b, t in drawn if b == name)) for name in SCHEMA.behaviours}
    return [event(name, next(times[name]), index + 1, (index % 19 + 1,)) for index, (name, _) in enumerate(drawn)]


@settings(max_examples=150, deadline=None)
@given(histories)
def test_time_merge_is_a_stable_sort(drawn: list[tuple[str, int]]) -> None:
    events = in_order(drawn)
    tokens = merge_tokens(SCHEMA, parse_history(SCHEMA, events), "time")
    expected = sorted(events, key=lambda e: e["timestamp"])
    assert tokens["item_id"].tolist() == [e["item_id"] for e in expected]
    assert tokens["behaviour"].tolist() == [SCHEMA.behaviours.index(e["behaviour"]) for e in expected]
    assert tokens["tags"][:, 0].tolist() == [e["tags"][0] for e in expected]


@settings(max_examples=150, deadline=None)
@given(histories)
def test_intent_merge_concatenates_with_sep(drawn: list[tuple[str, int]]) -> None:
    events = in_order(drawn)
    expected: list[tuple[int, int, float]] = []
    for index, name in enumerate(SCHEMA.behaviours):
        own = sorted((e for e in events if e["behaviour"] == name), key=lambda e: e["timestamp"])
        if own and expected:
            expected.append((3 + index, 0, 0.0))
        expected += [(index, e["item_id"], e["price"]) for e in own]
    tokens = merge_tokens(SCHEMA, parse_history(SCHEMA, events), "intent")
    found = zip(tokens["behaviour"].tolist(), tokens["item_id"].tolist(), tokens["price"].tolist(), strict=True)
    assert list(found) == expected


IDS = "ids are integers from 0 to 999"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"item_id": 5.0}, f"history: item_id of event 1 is 5.0; {IDS}", id="float-id"),
        pytest.param({"item_id": "5"}, f"item_id of event 1 is '5' (str); {IDS}", id="string-id"),
        pytest.param({"item_id": True}, f"item_id of event 1 is True; {IDS}", id="bool-id"),
        pytest.param({"item_id": None}, "item_id of event 1 is None", id="null-id"),
        pytest.param({"item_id": [7]}, "item_id of event 1 is [7] (list)", id="list-id"),
        pytest.param(
            {"item_id": 1000}, "item_id of event 1 is 1000; ids are integers from 0 to 999; send 0", id="high"
        ),
        pytest.param({"item_id": -1}, f"item_id of event 1 is -1; {IDS}", id="negative"),
        pytest.param({"item_id": 2**80}, "item_id of event 1 is 1208925819614629174706176", id="huge-id"),
        pytest.param({"price": "3"}, "price of event 1 is '3' (str); numeric features take finite", id="string-number"),
        pytest.param({"price": float("nan")}, "price of event 1 is nan; numeric features take finite", id="nan"),
        pytest.param({"price": float("-inf")}, "price of event 1 is -inf", id="inf"),
        pytest.param({"price": 1e39}, "price of event 1 is 1e+39; numeric features take finite float32", id="overflow"),
        pytest.param({"price": 10**400}, "price of event 1 is 1000", id="huge-number"),
        pytest.param({"price": 10**5000}, "price of event 1 is a huge integer", id="unprintable-number"),
        pytest.param({"tags": [1, 2, 3, 4]}, "tags of event 1 has 4 values: [1, 2, 3, 4]; multi", id="too-many"),
        pytest.param({"tags": 7}, "tags of event 1 is 7; multi features take lists of at most 3 ids", id="no-list"),
        pytest.param({"tags": "abc"}, "tags of event 1 is 'abc' (str)", id="string-list"),
        pytest.param(
            {"tags": [1, 20]}, "tags of event 1, value 1, is 20; ids are integers from 0 to 19", id="high-tag"
        ),
        pytest.param({"tags": [1, "x"]}, "tags of event 1, value 1, is 'x' (str)", id="string-tag"),
        pytest.param(
            {"behaviour": "view"},
            "behaviour of event 1 is 'view' (str); known behaviours are purchase, cart",
            id="behaviour",
        ),
        pytest.param({"behaviour": 2}, "behaviour of event 1 is 2; known behaviours", id="behaviour-number"),
        pytest.param({"behaviour": []}, "behaviour of event 1 is [] (list); known behaviours", id="behaviour-list"),
        pytest.param(
            {"timestamp": 9}, "timestamp of event 1 is 9, earlier than 10 of event 0; sort the click events", id="back"
        ),
        pytest.param({"timestamp": float("inf")}, "timestamp of event 1 is inf; timestamps are finite", id="inf-time"),
        pytest.param({"timestamp": "now"}, "timestamp of event 1 is 'now' (str)", id="string-time"),
        pytest.param({"item": 1}, "event 1: unknown feature 'item'", id="unknown"),
        pytest.param({"price": ...}, "event 1: feature 'price' is missing; needed are behaviour", id="missing"),
        pytest.param(
            {"price": ..., "pice": 1}, "event 1: unknown feature 'pice'; did you mean 'price'?", id="misspelt"
        ),
    ],
)
def test_event_errors(change: dict[str, Any], words: str) -> None:
    events = [dict(e) for e in EVENTS]
    events[1] = {name: value for name, value in (events[1] | change).items() if value is not ...}
    with pytest.raises(DataError) as caught:
        parse_history(SCHEMA, events)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"item_id": np.arange(5.0)}, "item_id of event 0 is 0.0", id="float-array"),
        pytest.param({"item_id": np.array([1, 2, 1000, 3, 4])}, "item_id of event 2 is 1000", id="high-array"),
        pytest.param({"item_id": np.array([1, 2**63, 3, 4, 5], np.uint64)}, "item_id of event 1 is 92233", id="uint64"),
        pytest.param({"item_id": np.ones((5, 1), int)}, "array of int64 [5, 1]", id="two-dimensions"),
        pytest.param({"price": [1.0, 2.0]}, "price has 2 values and behaviour has 5", id="ragged"),
        pytest.param(
            {"price": 3.5}, "history: price is 3.5; give a list or array with one value per event", id="scalar"
        ),
        pytest.param({"tags": np.ones(5, int)}, "tags has shape (5,); multi features take lists", id="flat-tags"),
        pytest.param({"tags": np.eye(5, dtype=int)}, "tags of event 3 has 4 values: [0, 0, 0, 1]", id="wide-tags"),
        pytest.param(
            {"behaviour": np.array([0, 1, 2, 3, 0])}, "behaviour of event 3 is 3; known", id="behaviour-index"
        ),
        pytest.param(
            {"behaviour": "click"}, "history: behaviour is 'click' (str); give one behaviour", id="one-behaviour"
        ),
        pytest.param({"prise": [1]}, "history: unknown feature 'prise'", id="unknown-column"),
    ],
)
def test_column_errors(change: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_history(SCHEMA, columns_of(EVENTS) | change)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("history", "words"),
    [
        pytest.param("clicks", "history is 'clicks' (str); give a list with one mapping per event", id="string"),
        pytest.param(None, "history is None", id="none"),
        pytest.param([EVENTS[0], 3], "history: event 1 is 3; give a mapping", id="number-in-list"),
    ],
)
def test_history_of_a_wrong_shape(history: Any, words: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_history(SCHEMA, history)
    assert words in str(caught.value)
