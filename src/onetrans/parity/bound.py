"""The bound: how far a result may be from the reference. Every test, benchmark and verify takes it from here."""

from __future__ import annotations

from onetrans.precision import BY_NAME

FACTOR = 1.5  # over plain PyTorch: another order of the same roundings, and no coarser one
FLOOR_ULP = 4  # where plain PyTorch is exact by luck, or nearly so
REFERENCE_ULP = 1024  # some thousand roundings of a deep model, were they all to add up


def bound(eager_error: float, largest: float, dtype: str, *, ulps: float = FLOOR_ULP) -> float:
    """What an error may be: FACTOR times that of plain PyTorch in the same dtype, plus a floor of a few ulp.

    Args:
        eager_error: Largest error of the eager forward (or op) in `dtype` against float64.
        largest: Largest value whose rounding counts: of the result, or of the terms that were rounded before their sum.
        dtype: The dtype's name, as `bfloat16`.
        ulps: Units in the last place of `largest` in the floor.
    """
    return FACTOR * eager_error + ulps * BY_NAME[dtype].ulp * largest  # type: ignore[index]


def eager_limit(largest: float, dtype: str) -> float:
    """How far the eager forward itself can be from float64; beyond that, one of the two is not of this model."""
    return REFERENCE_ULP * BY_NAME[dtype].ulp * largest  # type: ignore[index]
