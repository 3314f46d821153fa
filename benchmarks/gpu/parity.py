"""How far a contestant is from a reference in float64, and how far it may be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from onetrans.errors import ParityError
from onetrans.parity.verify import FACTOR, FLOOR_ULP

OTHERS = 4.0  # times the bound for other libraries' kernels, which need only compute the same function


@dataclass(frozen=True, kw_only=True)
class Parity:
    """One comparison.

    Attributes:
        error: Largest absolute error.
        bound: What it may be.
        relative: Euclidean norm of the error over that of the gold.
        relative_bound: What that may be.
    """

    error: float
    bound: float
    relative: float
    relative_bound: float

    @property
    def passed(self) -> bool:
        """Both within their bounds; False for NaN."""
        return self.error <= self.bound and self.relative <= self.relative_bound

    def plain(self) -> dict[str, float | bool | None]:
        """For a record; a number that is none is None."""
        values = {name: value if math.isfinite(value) else None for name, value in vars(self).items()}
        return {**values, "passed": self.passed}


def relative_norm(out: torch.Tensor, gold: torch.Tensor) -> float:
    """The Euclidean norm of out - gold over that of gold."""
    return float(torch.linalg.vector_norm(out.double() - gold) / torch.linalg.vector_norm(gold))


def compare(
    out: torch.Tensor,
    plain: torch.Tensor,
    gold: torch.Tensor,
    *,
    rounding: torch.Tensor | None = None,
    slack: float = 1.0,
) -> Parity:
    """Compares with gold, on the measure of plain PyTorch in the same dtype.

    The largest error may be 1.5 times plain PyTorch's and one more rounding of what is summed: half an ulp of the
    largest of `rounding` (softmax weights are rounded to the dtype before they meet the values), by default an ulp of
    the largest of the result. So may the norm's, and half an ulp.

    Args:
        out: To be judged.
        plain: The reference in the same dtype.
        gold: The reference in float64.
        rounding: Terms that are rounded before they are summed.
        slack: Multiplies the bounds.
    """
    eps = torch.finfo(plain.dtype).eps
    rest = eps * float(gold.abs().max()) if rounding is None else eps / 2 * float(rounding.abs().max())
    return Parity(
        error=float((out.double() - gold).abs().max()),
        bound=slack * (FACTOR * float((plain.double() - gold).abs().max()) + rest),
        relative=relative_norm(out, gold),
        relative_bound=slack * (FACTOR * relative_norm(plain, gold) + eps / 2),
    )


Values = dict[str, torch.Tensor]


def compare_programs(out: Values, plain: Values, gold: Values, dtype: torch.dtype) -> Parity:
    """The same for programs, which have several outputs: errors are over each output's largest value, the worst counts.

    The bound is the exporter's: 1.5 times plain PyTorch's and 4 ulp.

    Raises:
        ParityError: A whole number (a length) differs.
    """
    worst = {"error": 0.0, "relative": 0.0}
    allowed = dict(worst)
    for name, wanted in gold.items():
        if not wanted.is_floating_point():
            if not torch.equal(out[name], wanted):
                raise ParityError(f"output {name} differs from the reference's")
            continue
        largest = float(wanted.abs().max())
        for values, into in ((out, worst), (plain, allowed)):
            error = float((values[name].double() - wanted).abs().max()) / largest
            relative = relative_norm(values[name], wanted)
            into["error"] = error if error != error else max(into["error"], error)
            into["relative"] = relative if relative != relative else max(into["relative"], relative)
    rest = FLOOR_ULP * torch.finfo(dtype).eps
    return Parity(
        error=worst["error"],
        bound=FACTOR * allowed["error"] + rest,
        relative=worst["relative"],
        relative_bound=FACTOR * allowed["relative"] + rest,
    )
