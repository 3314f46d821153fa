"""One user of a bundle, whose state stays in slots, so that prefill, append and decode are timed apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onetrans.bench.onnx_graphs import graph_flops
from onetrans.errors import ParityError
from onetrans.features.encode import encode_candidates, encode_tokens, encode_users
from onetrans.features.merge import merge_tokens, parse_history
from onetrans.features.random_requests import random_request
from onetrans.features.requests import Request
from onetrans.runtime.manifest import Manifest
from onetrans.runtime.pools.base import StatePool
from onetrans.runtime.ranker import Ranker

ALLOWED = 1e-5  # relative, of scores: what the bundle's parity is held to


@dataclass(frozen=True, eq=False)
class OneUser:
    """A random user with a long history, and slots to compute in."""

    ranker: Ranker
    pool: StatePool
    request: Request
    tokens: dict[str, Any]
    profile: dict[str, Any]
    candidates: dict[str, Any]

    @property
    def manifest(self) -> Manifest:
        """The bundle's."""
        return self.ranker.bundle.manifest

    def inputs(self, first: int, last: int) -> dict[str, Any]:
        """User-scope inputs with the events from `first` up to `last`."""
        known = {name: column[:last] for name, column in self.tokens.items()}
        return {**encode_tokens(self.manifest.schema, [known], [first]), **self.profile}

    def window(self, events: int) -> dict[str, Any]:
        """User-scope inputs of a prefill of so many events."""
        return self.inputs(self.manifest.pyramid.starts(events)[0], events)

    def prefill(self, slot: int, events: int) -> Callable[[], None]:
        """Computes the state of so many events, the encoding apart."""
        inputs = self.window(events)
        return lambda: self.ranker.backend.prefill(self.pool, [slot], inputs)

    def append(self, slot: int, before: int, after: int) -> Callable[[], None]:
        """Appends to the state that the slot holds now; can be run again and again."""
        inputs, kept = self.inputs(before, after), self.pool.lengths(slot).copy()

        def run() -> None:
            self.pool.lengths(slot)[:] = kept
            self.ranker.backend.append(self.pool, [slot], inputs)

        return run

    def decode(self, slot: int = 0) -> dict[str, Any]:
        """Logits of the request's candidates by task."""
        counts = np.array([next(iter(self.candidates.values())).shape[1]])
        return {**self.ranker.backend.decode(self.pool, [slot], {**self.profile, **self.candidates}, counts)}

    def scores(self, slot: int) -> Any:
        """Logits of the request's candidates, all tasks in a row."""
        return np.concatenate([value[0] for value in self.decode(slot).values()])

    def graph_flops(self, name: str, inputs: Mapping[str, Any]) -> int:
        """Operations of the products of a graph of the bundle, as it runs on this request."""
        values = {**self.pool.read(0), **inputs, **self.profile, **self.candidates}
        given = {spec.name: values[spec.name] for spec in self.manifest.graphs[name].inputs}
        return graph_flops(self.ranker.bundle, name, given)


def one_user(ranker: Ranker, events: int, candidates: int, slots: int = 2, seed: int = 0) -> OneUser:
    """A random user of an opened bundle, with so many events and candidates."""
    schema, merge = ranker.bundle.manifest.schema, ranker.bundle.manifest.merge
    request = random_request(schema, events=events, candidates=candidates, rng=np.random.default_rng(seed))
    return OneUser(
        ranker=ranker,
        pool=ranker.backend.allocate(slots),
        request=request,
        tokens=merge_tokens(schema, parse_history(schema, request.history), merge),
        profile=encode_users(schema, [request.profile]),
        candidates=encode_candidates(schema, [request.candidates])[0],
    )


def agree(name: str, found: Any, expected: Any, *, allowed: float = ALLOWED) -> None:
    """No figure of speed from scores that are wrong.

    Raises:
        ParityError: They are further than `allowed` times the norm of what was expected.
    """
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    if not error <= allowed:
        raise ParityError(f"{name}: scores are {error:.1e} from the bundle's, {allowed:.0e} is allowed")
