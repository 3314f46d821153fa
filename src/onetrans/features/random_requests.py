"""Random requests of any schema: for parity cases, and for load where no log is at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from onetrans.features.columns import Columns
from onetrans.features.requests import Request
from onetrans.features.schema import Feature, FeatureSchema


def random_columns(features: Sequence[Feature], count: int, rng: np.random.Generator) -> Columns:
    """Uniform ids (0, unknown, among them) and standard normal numbers: each [count] or [count, width]."""
    columns: Columns = {}
    for feature in features:
        if feature.kind == "numeric":
            columns[feature.name] = rng.standard_normal(count).astype(np.float32)
        elif feature.kind == "categorical":
            columns[feature.name] = rng.integers(0, feature.vocab, count)
        else:
            given = np.arange(feature.width) < rng.integers(0, feature.width + 1, count)[:, None]
            columns[feature.name] = rng.integers(1, feature.vocab, (count, feature.width)) * given
    return columns


def random_request(schema: FeatureSchema, *, events: int, candidates: int, rng: np.random.Generator) -> Request:
    """A request with that many events, a minute or so apart, and candidates."""
    history: dict[str, Any] = random_columns(schema.event, events, rng)
    history["behaviour"] = [schema.behaviours[i] for i in rng.integers(0, len(schema.behaviours), events)]
    history["timestamp"] = 1_700_000_000 + np.cumsum(rng.integers(1, 120, events))
    profile = {name: column[0] for name, column in random_columns(schema.user, 1, rng).items()}
    return Request(history=history, profile=profile, candidates=random_columns(schema.candidate, candidates, rng))


def first_events(request: Request, events: int, user: str = "") -> Request:
    """A random request as it stood after its first events."""
    assert isinstance(request.history, Mapping)
    return replace(request, history={name: column[:events] for name, column in request.history.items()}, user=user)
