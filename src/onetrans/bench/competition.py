"""A competition on a torch device: each contestant is judged against float64, then those that passed are timed."""

from __future__ import annotations

import dataclasses
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from onetrans.bench.rates import Rates, Work
from onetrans.bench.runner import LostContextError
from onetrans.bench.stats import LEAST_PAIRS
from onetrans.bench.suite import Outcome, Row, estimated
from onetrans.bench.timing import Blocks, Run, Timer, microseconds, times_faster, typical
from onetrans.errors import ParityError
from onetrans.parity.bound import bound
from onetrans.precision import of_torch

OURS = "kernels"
OTHERS = 4.0  # times the bound for other libraries' kernels, which need only compute the same function
Values = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Parity:
    """One comparison: the largest error and the norm's, relative to the reference's, and what each may be."""

    error: float
    bound: float
    relative: float
    relative_bound: float

    @property
    def passed(self) -> bool:
        """Both within their bounds; False for NaN."""
        return self.error <= self.bound and self.relative <= self.relative_bound

    def loosened(self, slack: float) -> Parity:
        """The same with bounds times `slack`."""
        return dataclasses.replace(self, bound=slack * self.bound, relative_bound=slack * self.relative_bound)

    def plain(self) -> dict[str, float | bool | None]:
        """For a record; a number that is none is None."""
        values = {name: value if math.isfinite(value) else None for name, value in vars(self).items()}
        return {**values, "passed": self.passed}


def _errors(out: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """The largest error, and the Euclidean norm of the error over that of the reference."""
    off = out.double() - reference
    return float(off.abs().max()), float(torch.linalg.vector_norm(off) / torch.linalg.vector_norm(reference))


def compare(
    out: torch.Tensor, plain: torch.Tensor, reference: torch.Tensor, *, rounding: torch.Tensor | None = None
) -> Parity:
    """Compares with float64, on the measure of plain PyTorch in the same dtype and one more rounding of what is summed.

    That is half an ulp of the largest of `rounding` (softmax weights are rounded to the dtype before they meet the
    values), by default an ulp of the largest of the result; of the norm, half an ulp.
    """
    dtype = of_torch(plain.dtype).name
    (error, relative), (eager, eager_relative) = _errors(out, reference), _errors(plain, reference)
    summed, ulps = (reference, 1.0) if rounding is None else (rounding, 0.5)
    return Parity(
        error=error,
        bound=bound(eager, float(summed.abs().max()), dtype, ulps=ulps),
        relative=relative,
        relative_bound=bound(eager_relative, 1.0, dtype, ulps=0.5),
    )


def compare_programs(out: Values, plain: Values, reference: Values, dtype: torch.dtype) -> Parity:
    """The same for programs, which have several outputs: errors are over each output's largest value, the worst counts.

    The bound is the exporter's, of errors relative to the largest value.

    Raises:
        ParityError: A whole number (a length) differs.
    """
    mine, eager = [(0.0, 0.0)], [(0.0, 0.0)]
    for name, wanted in reference.items():
        if not wanted.is_floating_point():
            if not torch.equal(out[name], wanted):
                raise ParityError(f"output {name} differs from the reference's")
            continue
        largest = float(wanted.abs().max())
        for values, into in ((out, mine), (plain, eager)):
            error, relative = _errors(values[name], wanted)
            into.append((error / largest, relative))
    worst = [[_worst(pair[i] for pair in pairs) for i in (0, 1)] for pairs in (mine, eager)]
    allowed = [bound(value, 1.0, of_torch(dtype).name) for value in worst[1]]
    return Parity(error=worst[0][0], bound=allowed[0], relative=worst[0][1], relative_bound=allowed[1])


def _worst(values: Any) -> float:
    found = list(values)
    return math.nan if any(value != value for value in found) else max(found)


class Arena(Protocol):
    """What a competition needs of a context."""

    quick: bool

    @property
    def progress(self) -> Callable[[str], None]:
        """Takes a line for the reader."""

    @property
    def timer(self) -> Timer:
        """The device's timer."""

    @property
    def limits(self) -> Rates:
        """The device's rates."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One of those who compute something: `parity` judges its result before anything is timed, `run` makes it ready."""

    name: str
    parity: Callable[[], Parity]
    run: Callable[[], Run]


def compete(
    context: Arena,
    outcome: Outcome,
    case: str,
    contestants: Sequence[Contestant],
    work: Work,
    dtype: str,
    launched: Mapping[str, int | None],
    **extra: Any,
) -> Blocks:
    """Judges, then times in turn; adds a figure per contestant to the outcome. Gives the samples of those that ran.

    Args:
        context: The run's context.
        outcome: Takes figures and samples; who fails or cannot run is recorded without times.
        case: Names what is computed.
        contestants: Each is judged before it is timed.
        work: For floor, achieved rates and prediction.
        dtype: Dtype of the operands.
        launched: Which contestants are ours, and how many kernels each launches; None for one of each of the work's
            parts.
        **extra: Further facts for every figure.
    """
    limits = context.limits
    ours = [contestant.name for contestant in contestants if contestant.name in launched]
    predicted, floor = {name: limits.predict(work, dtype, launched[name]) for name in ours}, limits.floor(work, dtype)
    told = "".join(f"{name} predicted {1e6 * seconds:.1f} µs, " for name, seconds in predicted.items())
    context.progress(f"{case}: {told}floor {1e6 * floor:.1f} µs")
    runs: dict[str, Run] = {}
    judged: dict[str, Parity] = {}
    for contestant in contestants:
        figure = {"case": case, "contestant": contestant.name}
        try:
            judged[contestant.name] = found = contestant.parity()
            if found.passed:
                runs[contestant.name] = contestant.run()
            else:
                outcome.figures.append({**figure, "failed": "parity", "parity": found.plain()})
                context.progress(f"{case}: {contestant.name} is not the reference's: {found}")
        except Exception as error:
            check_alive(error)
            outcome.figures.append({**figure, "failed": reason(error)})
            context.progress(f"{case}: {contestant.name} cannot run: {reason(error)}")
            if contestant.name in launched:
                traceback.print_exc(file=sys.stderr)
    missing = [name for name in ours if name not in runs]
    if missing:
        outcome.failed = f"{case}: {' and '.join(missing)} failed; see the figures"
    blocks: Blocks = context.timer.blocks(runs, **({"count": LEAST_PAIRS} if context.quick else {})) if runs else {}
    for name, samples in blocks.items():
        time = typical(samples)
        count = {"launches": launched[name]} if launched.get(name) else {}
        outcome.figures.append(
            {"case": case, "contestant": name, "seconds": vars(time), "predicted": predicted.get(name), **count}
            | {"floor": floor, "flops": work.flops, "bytes": work.bytes}
            | {"flops_per_second": work.flops / time.value, "bytes_per_second": work.bytes / time.value}
            | {"share_of_matmul": work.flops / time.value / limits.matmul[dtype]}
            | {"share_of_copy": work.bytes / time.value / limits.copy}
            | {"parity": judged[name].plain(), **extra}
        )
    outcome.samples[case] = microseconds(blocks)
    context.progress(f"{case}: " + ", ".join(f"{n} {1e6 * typical(b).value:.1f}" for n, b in blocks.items()) + " µs")
    return blocks


def faster_row(name: str, blocks: Blocks, others: Iterable[str], target: float | None) -> Row | None:
    """How many times faster ours is than the fastest of the others that ran; None where a side is missing."""
    there = [other for other in others if other in blocks]
    if OURS not in blocks or not there:
        return None
    best = min(there, key=lambda other: typical(blocks[other]).value)
    ratio = times_faster(blocks[OURS], blocks[best])
    return estimated(ratio, f"{name}, times faster than {best}", target=target, at_least=True)


def reason(error: BaseException) -> str:
    """The first line of an error, with its kind."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


def check_alive(error: BaseException) -> None:
    """Sees whether the device still answers after an error.

    Raises:
        LostContextError: It does not.
    """
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    except Exception:
        raise LostContextError(f"the device's context is lost after {reason(error)}; run again") from error
