"""Comparison of scores with the reference: errors, and what users feel of them: top-k overlap and rank correlation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onetrans.parity.cases import ParityCase

Logits = Mapping[str, NDArray[Any]]

TOP_K = 10


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """How far one case is from the reference.

    Attributes:
        name: The case's.
        users: U.
        lengths: S-tokens of each user.
        candidates: C.
        error: Largest absolute error of a logit.
        eager_error: The same of plain PyTorch in the bundle's dtype.
        bound: What `error` may be.
        relative_error: Euclidean norm of the error over that of the reference, all tasks together.
        top_k: Share of the reference's best k candidates (k = 10 or all) among the bundle's, mean over users; first
            task.
        rank_correlation: Spearman's, mean over users; first task. 1 for a single candidate.
        passed: error <= bound.
    """

    name: str
    users: int
    lengths: tuple[int, ...]
    candidates: int
    error: float
    eager_error: float
    bound: float
    relative_error: float
    top_k: float
    rank_correlation: float
    passed: bool


def compare(case: ParityCase, logits: Logits, allowed: float) -> CaseResult:
    """Compares a case's logits [U, C] per task with its reference, within `allowed`."""
    reference = np.concatenate([value.ravel() for value in case.reference.values()])
    found = np.concatenate([logits[task].ravel() for task in case.reference])
    first = next(iter(case.reference))
    error = largest_error(logits, case.reference)
    return CaseResult(
        name=case.name,
        users=case.users,
        lengths=tuple(int(tokens) for tokens in case.tokens),
        candidates=case.candidates,
        error=error,
        eager_error=largest_error(case.eager, case.reference),
        bound=allowed,
        relative_error=float(np.linalg.norm(found - reference) / np.linalg.norm(reference)),
        top_k=_top_k(logits[first], case.reference[first]),
        rank_correlation=_rank_correlation(logits[first], case.reference[first]),
        passed=bool(error <= allowed),  # False for NaN
    )


def largest_error(logits: Logits, reference: Logits) -> float:
    """Largest absolute difference over all tasks; NaN where there is one."""
    return float(np.max([np.abs(logits[task] - value).max() for task, value in reference.items()]))


def largest_value(logits: Logits) -> float:
    """Largest absolute logit over all tasks."""
    return max(float(np.abs(value).max()) for value in logits.values())


def _top_k(found: NDArray[Any], reference: NDArray[Any]) -> float:
    k = min(TOP_K, reference.shape[1])
    pairs = zip(found, reference, strict=True)
    best = [np.intersect1d(np.argsort(-f)[:k], np.argsort(-r)[:k]).size / k for f, r in pairs]
    return float(np.mean(best))


def _rank_correlation(found: NDArray[Any], reference: NDArray[Any]) -> float:
    if reference.shape[1] < 2:
        return 1.0
    ranks = [np.argsort(np.argsort(x, axis=1), axis=1).astype(np.float64) for x in (found, reference)]
    centred = [r - r.mean(axis=1, keepdims=True) for r in ranks]
    products = (centred[0] * centred[1]).sum(axis=1)
    norms = np.sqrt((centred[0] ** 2).sum(axis=1) * (centred[1] ** 2).sum(axis=1))
    return float(np.mean(products / norms))
