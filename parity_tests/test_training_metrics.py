"""AUC and UAUC of held-out requests, against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from onetrans.model.training.metrics import auc, uauc


def brute_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    above, below = scores[labels == 1], scores[labels == 0]
    pairs = (above[:, None] > below).astype(float) + 0.5 * (above[:, None] == below)
    return float(pairs.mean()) if pairs.size else float("nan")


@pytest.mark.parametrize("n", [2, 3, 63, 500])
@pytest.mark.parametrize("distinct", [1, 4, 10_000])
def test_auc_equals_counting_pairs(n: int, distinct: int) -> None:
    rng = np.random.default_rng(n + distinct)
    labels, scores = rng.integers(2, size=n), rng.integers(distinct, size=n) / 7
    labels[:2] = 0, 1
    assert abs(auc(labels, scores) - brute_auc(labels, scores)) < 1e-12


@pytest.mark.parametrize("distinct", [3, 10_000])
def test_uauc_equals_weighing_the_users(distinct: int) -> None:
    rng = np.random.default_rng(distinct)
    users, labels, scores = rng.integers(40, size=300) * 7, rng.random(300) < 0.2, rng.integers(distinct, size=300)
    total = weight = 0.0
    for user in np.unique(users):
        of = users == user
        if 0 < labels[of].sum() < of.sum():
            total += of.sum() * brute_auc(labels[of].astype(int), scores[of])
            weight += of.sum()
    assert abs(uauc(users, labels, scores) - total / weight) < 1e-12


def test_absent_classes_give_nan() -> None:
    assert np.isnan(auc([1, 1], [0.1, 0.2]))
    assert np.isnan(auc([], []))
    assert np.isnan(uauc([1, 2], [1, 0], [0.1, 0.2]))
    assert np.isnan(uauc([], [], []))
    assert uauc([1, 1, 2], [1, 0, 0], [0.9, 0.1, 0.5]) == 1.0
