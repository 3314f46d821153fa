"""Model inputs: names, dtypes, padding, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onetrans.errors import DataError
from onetrans.features.encode import encode_candidates, encode_tokens, encode_users, input_specs
from onetrans.features.merge import merge_tokens, parse_history
from onetrans.features.schema import Feature, FeatureSchema
from onetrans.spec import TensorSpec

ITEM = Feature(name="item_id", kind="categorical", vocab=100, dim=4)
TAGS = Feature(name="tags", kind="multi", vocab=20, dim=2, width=3)
PRICE = Feature(name="price", kind="numeric")
SCHEMA = FeatureSchema(
    behaviours=("buy", "click"),
    event=(ITEM, PRICE, TAGS),
    user=(Feature(name="age", kind="categorical", vocab=9, dim=2), PRICE, TAGS),
    candidate=(ITEM, PRICE, TAGS),
)


def tokens_of(length: int) -> dict[str, np.ndarray]:
    history = [
        {"behaviour": "click", "timestamp": i, "item_id": i % 99 + 1, "price": i + 0.5, "tags": [1 + i % 19] * (i % 4)}
        for i in range(length)
    ]
    return merge_tokens(SCHEMA, parse_history(SCHEMA, history), "time")


def test_specs_list_every_input_in_order() -> None:
    specs = input_specs(SCHEMA)
    assert [(s.name, s.dtype, s.dims, s.scope) for s in specs] == [
        ("event_behaviour", "int64", ("U", "L"), "user"),
        ("event_item_id", "int64", ("U", "L"), "user"),
        ("event_price", "float32", ("U", "L"), "user"),
        ("event_tags", "int64", ("U", "L", 3), "user"),
        ("history_length", "int64", ("U",), "user"),
        ("history_start", "int64", ("U",), "user"),
        ("user_age", "int64", ("U",), "user"),
        ("user_price", "float32", ("U",), "user"),
        ("user_tags", "int64", ("U", 3), "user"),
        ("candidate_item_id", "int64", ("U", "C"), "candidate"),
        ("candidate_price", "float32", ("U", "C"), "candidate"),
        ("candidate_tags", "int64", ("U", "C", 3), "candidate"),
    ]


def check_against_specs(inputs: dict[str, np.ndarray], specs: tuple[TensorSpec, ...], sizes: dict[str, int]) -> None:
    assert set(inputs) == {spec.name for spec in specs}
    for spec in specs:
        assert inputs[spec.name].dtype == spec.dtype, spec.name
        assert inputs[spec.name].shape == tuple(sizes.get(d, d) for d in spec.dims), spec.name  # type: ignore[arg-type]


def test_encoded_batch_fits_the_specs() -> None:
    history = encode_tokens(SCHEMA, [tokens_of(5), tokens_of(0), tokens_of(2)], [1, 0, 0])
    users = encode_users(SCHEMA, [{"age": a, "price": a / 4, "tags": [a]} for a in (1, 2, 3)])
    given_candidates = [
        {"item_id": [7], "price": [0.5], "tags": [[1, 2]]},
        [{"item_id": i, "price": -i, "tags": []} for i in (1, 2)],
        {"item_id": np.array([3, 4]), "price": np.array([1.5, 2.5]), "tags": np.array([[1], [2]])},
    ]
    candidates, counts = encode_candidates(SCHEMA, given_candidates)
    check_against_specs(history | users | candidates, input_specs(SCHEMA), {"U": 3, "L": 4, "C": 2})
    assert history["event_item_id"].tolist() == [[2, 3, 4, 5], [0, 0, 0, 0], [1, 2, 0, 0]]
    assert history["history_length"].tolist() == [4, 0, 2]
    assert history["history_start"].tolist() == [1, 0, 0]
    assert users["user_price"].tolist() == [0.25, 0.5, 0.75]
    assert counts.tolist() == [1, 2, 2]
    assert candidates["candidate_item_id"].tolist() == [[7, 0], [1, 2], [3, 4]]
    assert candidates["candidate_price"].tolist() == [[0.5, 0.0], [-1.0, -2.0], [1.5, 2.5]]
    assert candidates["candidate_tags"][0].tolist() == [[1, 2, 0], [0, 0, 0]]


def test_batch_without_events_has_one_padded_token() -> None:
    inputs = encode_tokens(SCHEMA, [tokens_of(0)], [0])
    assert inputs["event_tags"].tolist() == [[[0, 0, 0]]]
    assert inputs["history_length"].tolist() == [0]


def test_tokens_behind_the_start_are_dropped_exactly() -> None:
    tokens = tokens_of(500)
    inputs = encode_tokens(SCHEMA, [tokens], [437])
    for name, column in tokens.items():
        assert np.array_equal(inputs[f"event_{name}"][0], column[437:])


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 70).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1, max_size=6))
def test_encode_round_trip(users: list[tuple[int, int]]) -> None:
    tokens = [tokens_of(length) for length, _ in users]
    inputs = encode_tokens(SCHEMA, tokens, [start for _, start in users])
    for user, (length, start) in enumerate(users):
        valid = int(inputs["history_length"][user])
        assert (valid, int(inputs["history_start"][user])) == (length - start, start)
        for name, column in tokens[user].items():
            row = inputs[f"event_{name}"][user]
            assert np.array_equal(row[:valid], column[start:])
            assert not row[valid:].any()


@pytest.mark.parametrize(
    ("starts", "words"),
    [
        pytest.param([0, 4], "history start 4 of user 1 lies outside its 3 tokens", id="beyond"),
        pytest.param([-1, 0], "history start -1 of user 0 lies outside its 2 tokens", id="negative"),
        pytest.param([0], "2 histories came with 1 starts", id="count"),
    ],
)
def test_start_errors(starts: list[int], words: str) -> None:
    with pytest.raises(DataError, match=words):
        encode_tokens(SCHEMA, [tokens_of(2), tokens_of(3)], starts)


GOOD = {"age": 1, "price": 0.5, "tags": [1]}


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        pytest.param(GOOD | {"age": 9}, "profile: age of user 1 is 9; ids are integers from 0 to 8", id="high"),
        pytest.param(GOOD | {"price": None}, "profile: price of user 1 is None", id="null"),
        pytest.param(GOOD | {"agee": 2}, "profile: user 1: unknown feature 'agee'; did you mean 'age'?", id="unknown"),
        pytest.param({"age": 1, "price": 0}, "profile: user 1: feature 'tags' is missing", id="missing"),
        pytest.param(7, "profile: user 1 is 7; give a mapping", id="number"),
    ],
)
def test_profile_errors(profile: Any, words: str) -> None:
    with pytest.raises(DataError) as caught:
        encode_users(SCHEMA, [GOOD, profile])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("candidates", "words"),
    [
        pytest.param([], "candidates of user 1: there are 0 candidates", id="none"),
        pytest.param({}, "candidates of user 1: feature 'item_id' is missing", id="empty-mapping"),
        pytest.param({"item_id": [], "price": [], "tags": []}, "there are 0 candidates; give at least one", id="empty"),
        pytest.param([{"item_id": 100, "price": 1, "tags": []}], "item_id of candidate 0 is 100", id="high"),
        pytest.param(
            {"item_id": [1, 2], "price": [1.0], "tags": [[], []]}, "price has 1 values and item_id has 2", id="ragged"
        ),
        pytest.param(
            [{"item_id": 1, "price": 1, "tag": []}],
            "candidate 0: unknown feature 'tag'; did you mean 'tags'?",
            id="misspelt",
        ),
        pytest.param("all", "candidates of user 1 is 'all' (str)", id="string"),
    ],
)
def test_candidate_errors(candidates: Any, words: str) -> None:
    with pytest.raises(DataError) as caught:
        encode_candidates(SCHEMA, [{"item_id": [1], "price": [0], "tags": [[]]}, candidates])
    assert words in str(caught.value)


def test_batch_without_users() -> None:
    with pytest.raises(DataError, match="the batch has no user"):
        encode_candidates(SCHEMA, [])
