"""Statistics of samples: percentiles and paired ratios, each with a bootstrap confidence interval.

All take seconds (or any one unit) and give estimates in the same unit; ratios have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from onetrans.errors import ConfigError

RANKS = (50, 95, 99)
LEAST_SAMPLES = 20  # of a percentile; below, p95 is no more than the maximum
LEAST_PAIRS = 5
CONFIDENCE = 0.95
RESAMPLES = 2000

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with the interval that holds it with probability `CONFIDENCE`, in the samples' unit."""

    value: float
    low: float
    high: float


def percentiles(samples: ArrayLike, *, ranks: Sequence[int] = RANKS, seed: int = 0) -> dict[str, Estimate]:
    """`p50`, `p95`, `p99` by linear interpolation between order statistics.

    Args:
        samples: At least LEAST_SAMPLES finite numbers, in any order.
        ranks: Percent, each in 0 … 100.
        seed: Seed of the bootstrap.

    Raises:
        ConfigError: Too few samples, or one that is not finite.
    """
    values = _checked("samples", samples, LEAST_SAMPLES)
    found: dict[str, Estimate] = {}
    draws = _resampled(len(values), seed)
    for rank in ranks:
        resampled = np.percentile(values[draws], rank, axis=1)
        found[f"p{rank}"] = _estimate(float(np.percentile(values, rank)), resampled)
    return found


def median(samples: ArrayLike, *, least: int = LEAST_PAIRS, seed: int = 0) -> Estimate:
    """The median of at least `least` samples.

    Raises:
        ConfigError: Too few samples, or one that is not finite.
    """
    return _bootstrap(_checked("samples", samples, least), np.median, seed)


def median_ratio(ours: ArrayLike, theirs: ArrayLike, *, least: int = LEAST_PAIRS, seed: int = 0) -> Estimate:
    """The median of ours[i] / theirs[i], where pair i was measured in turn so that drift of the machine cancels.

    Raises:
        ConfigError: Too few pairs, unequal numbers of samples, or one that is not finite and positive.
    """
    a, b = _checked("samples", ours, least), _checked("samples", theirs, least)
    if len(a) != len(b):
        raise ConfigError(f"{len(a)} samples cannot be paired with {len(b)}; measure both in turn")
    if min(a.min(), b.min()) <= 0:
        raise ConfigError(f"a paired sample is {min(a.min(), b.min())}; a ratio needs positive times")
    return _bootstrap(a / b, np.median, seed)


def _checked(what: str, samples: ArrayLike, least: int) -> Floats:
    values: Floats = np.asarray(samples, dtype=np.float64).ravel()
    if len(values) < least:
        raise ConfigError(f"{len(values)} {what} are too few for this statistic; measure at least {least}")
    if not np.isfinite(values).all():
        raise ConfigError(f"a sample is {values[~np.isfinite(values)][0]}; all must be finite")
    return values


def _resampled(count: int, seed: int) -> NDArray[np.int64]:
    """Indices [RESAMPLES, count], drawn with replacement."""
    return np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))


def _bootstrap(values: Floats, statistic: Callable[..., Floats], seed: int) -> Estimate:
    resampled = statistic(values[_resampled(len(values), seed)], axis=1)
    return _estimate(float(statistic(values)), resampled)


def _estimate(value: float, resampled: Floats) -> Estimate:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Estimate(value=value, low=float(low), high=float(high))
