"""What a request gets back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onetrans.runtime.cache.lookup import Kind


@dataclass(frozen=True)
class Scores:
    """Scores of one request's candidates, in the order they were given.

    Attributes:
        logits: Per task, float32 [C].
        seconds: Time spent per component, as far as it ran: `encode`, `load`, `prefill`, `append`, `decode`, `drift`,
            `offload`. Requests that were ranked together share the time that they took together.
        result: What the cache did: `reuse`, `append`, `prefill` or `stale`.
        fresh: Events computed for this request.
        drift: Largest difference of a logit from that of a fresh prefill, where it was measured (stale requests).
    """

    logits: Mapping[str, NDArray[np.float32]]
    seconds: Mapping[str, float]
    result: Kind = "prefill"
    fresh: int = 0
    drift: float | None = None

    def probabilities(self) -> dict[str, NDArray[np.float32]]:
        """Per task, float32 [C]; cvr is conditional on a click."""
        return {task: (1 / (1 + np.exp(-z.astype(np.float64)))).astype(np.float32) for task, z in self.logits.items()}

    def ranking(self, task: str | None = None) -> NDArray[np.int64]:
        """Candidate indices, best first by a task's logit (the first task by default); ties keep the order given."""
        logits = self.logits[task or next(iter(self.logits))]
        return np.argsort(-logits, kind="stable")
