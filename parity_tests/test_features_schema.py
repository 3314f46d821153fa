"""The feature schema and the anchored windows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from onetrans.errors import ConfigError
from onetrans.features.schema import Feature, FeatureSchema
from onetrans.features.synthetic.logs import log_schema
from onetrans.features.windows import Pyramid


def test_json_round_trip() -> None:
    schema = log_schema(items=77, tags=9, item_dim=48)
    assert FeatureSchema.from_json(json.loads(json.dumps(schema.to_json()))) == schema


def test_shared_tables_are_listed_once() -> None:
    assert log_schema(items=10, categories=5, item_dim=3, category_dim=2).tables() == {
        "item": (11, 3),
        "category": (6, 2),
        "age": (9, 8),
        "hour": (25, 8),
        "tags": (201, 8),
        "position": (51, 4),
    }


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        pytest.param({"name": "a b", "kind": "numeric"}, "'a b' is not an identifier", id="name"),
        pytest.param({"name": "timestamp", "kind": "numeric"}, "'timestamp' is reserved", id="reserved"),
        pytest.param({"name": "a", "kind": "text"}, "kind 'text' is not one of categorical", id="kind"),
        pytest.param({"name": "a", "kind": "categorical"}, "feature a: categorical needs vocab", id="no-vocab"),
        pytest.param({"name": "a", "kind": "numeric", "dim": 3}, "feature a: numeric takes no", id="numeric-dim"),
        pytest.param({"name": "a", "kind": "multi", "vocab": 3, "dim": 2}, "feature a: width", id="no-width"),
    ],
)
def test_feature_errors(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Feature(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"behaviours": []}, "behaviours", id="no-behaviour"),
        pytest.param({"event": []}, "no event feature", id="no-event-feature"),
        pytest.param({"user": [{"name": "n", "kind": "numeric"}] * 2}, "user feature n twice", id="twice"),
        pytest.param({"extra": 1}, "extra", id="unknown-field"),
        pytest.param({"user": [{"name": "n", "kind": "numeric", "size": 1}]}, "size", id="unknown-feature-field"),
        pytest.param(
            {"user": [{"name": "n", "kind": "categorical", "vocab": 4, "dim": 1, "table": "item"}]},
            "user feature n shares table 'item'",
            id="table-sizes",
        ),
    ],
)
def test_schema_errors(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FeatureSchema.from_json(log_schema().to_json() | change)


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("length", [0, 1, 63, 500, 1190])
def test_window_keeps_at_most_its_bound(length: int, chunk: int) -> None:
    pyramid = Pyramid(max_history=400, keep=(300, 96, 12), chunk=chunk)
    starts, bounds = pyramid.starts(length), pyramid.capacities
    anchor = length // chunk * chunk
    assert pyramid.key_starts(length) == starts[:-1]
    assert starts == tuple(max(0, anchor - k) for k in (400, 300, 96, 12))
    assert all(length - start <= bound for start, bound in zip(starts, bounds, strict=True))


def test_append_holds_until_the_anchor_moves() -> None:
    pyramid = Pyramid(max_history=64, keep=(32, 8), chunk=16)
    assert pyramid.can_append(96, 111)
    assert not pyramid.can_append(96, 112)
    assert not pyramid.can_append(0, 3)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"keep": ()}, "with a keep for each layer"),
        ({"chunk": 0}, "whole numbers from 1"),
        ({"keep": (8, 32)}, "must not grow from layer to layer"),
        ({"keep": (65,)}, "must not grow"),
        ({"max_history": 64.0}, "whole numbers from 1"),
    ],
)
def test_a_pyramid_that_cannot_be(sizes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Pyramid(**{"max_history": 64, "keep": (32, 8), "chunk": 16, **sizes})
