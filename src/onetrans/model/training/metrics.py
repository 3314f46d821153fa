"""Ranking metrics, in numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Probability that a positive outscores a negative, ties counting half; NaN where a class is absent.

    Args:
        labels: 0 or 1, [n].
        scores: [n].
    """
    return float(_aucs(np.zeros(np.size(labels), dtype=np.int64), np.asarray(labels), np.asarray(scores), 1)[0])


def uauc(users: ArrayLike, labels: ArrayLike, scores: ArrayLike) -> float:
    """Mean of the users' own AUCs, each weighted by the user's impressions; NaN where no user has both classes.

    A user whose labels are all alike has no AUC and is left out, impressions and all.

    Args:
        users: The user of each impression, [n].
        labels: 0 or 1, [n].
        scores: [n].
    """
    distinct, user = np.unique(np.asarray(users), return_inverse=True)
    each = _aucs(user, np.asarray(labels), np.asarray(scores), len(distinct))
    weight = np.where(np.isnan(each), 0, np.bincount(user, minlength=len(distinct)))
    return float(np.nansum(each * weight) / weight.sum()) if weight.any() else float("nan")


def _aucs(
    group: NDArray[np.int64], labels: NDArray[np.generic], scores: NDArray[np.generic], groups: int
) -> NDArray[np.float64]:
    """AUC of each group [groups] by the rank-sum, mid-ranks for ties (Mann-Whitney)."""
    order = np.lexsort((scores, group))
    g, s = group[order], scores[order]
    positive = labels[order].astype(bool)
    count = np.bincount(g, minlength=groups)
    begin = np.cumsum(count) - count
    new = np.ones(len(g), dtype=bool)
    new[1:] = (g[1:] != g[:-1]) | (s[1:] != s[:-1])
    run = np.cumsum(new) - 1
    first = np.flatnonzero(new)
    size = np.diff(np.append(first, len(g)))
    rank = (first + (size + 1) / 2)[run] - begin[g] if len(g) else np.zeros(0)
    positives = np.bincount(g, weights=positive, minlength=groups)
    negatives = count - positives
    total = np.bincount(g, weights=rank * positive, minlength=groups)
    pairs = positives * negatives
    each: NDArray[np.float64] = np.full(groups, np.nan)
    np.divide(total - positives * (positives + 1) / 2, pairs, out=each, where=pairs > 0)
    return each
