"""The Ranker: a request in, scores out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from onetrans.errors import DataError
from onetrans.features.encode import CandidatesLike, encode_candidates, encode_tokens, encode_users
from onetrans.features.merge import History, Merge, merge_tokens, parse_history
from onetrans.features.windows import window_starts
from onetrans.runtime.backends.base import Backend
from onetrans.runtime.backends.registry import open_backend
from onetrans.runtime.bundle import Bundle


@dataclass(frozen=True)
class Scores:
    """Scores of one request's candidates, in the order they were given.

    Attributes:
        logits: Per task, float32 [C].
        seconds: Time spent per component: `encode`, `prefill`, `decode`.
    """

    logits: Mapping[str, NDArray[np.float32]]
    seconds: Mapping[str, float]

    def probabilities(self) -> dict[str, NDArray[np.float32]]:
        """Per task, float32 [C]; cvr is conditional on a click."""
        return {task: (1 / (1 + np.exp(-z.astype(np.float64)))).astype(np.float32) for task, z in self.logits.items()}

    def ranking(self, task: str | None = None) -> NDArray[np.int64]:
        """Candidate indices, best first by a task's logit (the first task by default); ties keep the order given."""
        logits = self.logits[task or next(iter(self.logits))]
        return np.argsort(-logits, kind="stable")


class Ranker:
    """Scores candidates with a bundle."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle = bundle
        self.backend = backend
        self._schema = bundle.manifest.schema
        self._merge = cast(Merge, bundle.manifest.merge)

    @classmethod
    def open(cls, path: str | Path, *, threads: int | None = None) -> Ranker:
        """Opens a bundle for ranking.

        Args:
            path: The bundle.
            threads: Of the backend; its own choice if left out.

        Raises:
            BundleError: The bundle cannot be opened.
            MissingDependencyError: The backend's package is not installed.
        """
        bundle = Bundle.open(path)
        return cls(bundle, open_backend(bundle, threads=threads))

    def rank(self, *, history: History, profile: Mapping[str, Any], candidates: CandidatesLike) -> Scores:
        """Scores one user's candidates.

        Args:
            history: The user's events, all of them since the first: mappings, or a mapping of columns.
            profile: User features, the request's context among them.
            candidates: From one to the bundle's most.

        Raises:
            DataError: A value is missing, of the wrong kind or out of bounds.
        """
        began = time.perf_counter()
        user = self.encode_user(history, profile)
        candidate = self.encode_candidates(candidates)
        encoded = time.perf_counter()
        state = self.backend.prefill(user)
        filled = time.perf_counter()
        logits = self.backend.decode(state, candidate)
        done = time.perf_counter()
        seconds = {"encode": encoded - began, "prefill": filled - encoded, "decode": done - filled}
        return Scores({task: value[0] for task, value in logits.items()}, seconds)

    def encode_user(self, history: History, profile: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """The user-scope inputs of one user [1, …], with the window that a prefill sees."""
        manifest = self.bundle.manifest
        tokens = merge_tokens(self._schema, parse_history(self._schema, history), self._merge)
        w = manifest.windows
        total = len(tokens["behaviour"])
        start = window_starts(total, max_history=w.max_history, keep=w.keep, chunk=w.append_chunk)[0]
        return {**encode_tokens(self._schema, [tokens], [start]), **encode_users(self._schema, [profile])}

    def encode_candidates(self, candidates: CandidatesLike) -> dict[str, NDArray[Any]]:
        """The candidate-scope inputs of one user [1, C, …]."""
        inputs, counts = encode_candidates(self._schema, [candidates])
        most = self.bundle.manifest.bounds["C"][1]
        if counts[0] > most:
            raise DataError(f"{counts[0]} candidates were given; this bundle takes 1 to {most}: score them in parts")
        return inputs
