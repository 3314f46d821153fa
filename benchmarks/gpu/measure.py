"""What the GPU suite's measures share: the context they run in, their outcome, and a competition among contestants."""

from __future__ import annotations

import dataclasses
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.gpu.parity import Parity
from benchmarks.gpu.reckoning import PREDICTION, Ceilings, Work
from benchmarks.gpu.timing import Blocks, Run, Timer, microseconds, times_faster, typical
from benchmarks.measure import Row, estimated
from onetrans.bench.stats import Estimate
from onetrans.errors import JobError
from onetrans.model.config import ModelConfig
from onetrans.model.presets import preset

OURS = "kernels"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured of a model.

    Attributes:
        config: The model.
        history: Events that kernels see in a fresh prefill.
        prefill: Events of the prefill program.
        before: Events of the state that an append meets.
        new: Events of an append.
        candidates: C of every decode.
        request: C of the whole request and of the targets.
    """

    config: ModelConfig
    history: int
    prefill: int
    before: int
    new: int
    candidates: tuple[int, ...]
    request: int


def real_sizes(name: str) -> Sizes:
    """Of a preset, as the targets are stated."""
    config = preset(name)
    return Sizes(
        config=config,
        history=config.max_history,
        prefill=1190,
        before=1100,
        new=8,
        candidates=(1, 100, 500, 2000),
        request=100,
    )


def rehearsal_sizes(name: str) -> Sizes:
    """Small enough for the interpreter, under the name of the preset."""
    config = dataclasses.replace(preset("tiny"), name=name)
    return Sizes(config=config, history=70, prefill=70, before=66, new=2, candidates=(1, 3), request=3)


@dataclass
class Context:
    """Of one run of the suite.

    Attributes:
        timer: A GPU's or a rehearsal's.
        device: Where tensors lie.
        rehearse: Tiny sizes, nothing compiled, nothing kept.
        progress: Takes a line for the reader.
        ceilings: The device's; None until measured.
        programs: Captured programs by model and dtype, kept for later measures.
    """

    timer: Timer
    device: torch.device
    rehearse: bool
    progress: Callable[[str], None]
    ceilings: Ceilings | None = None
    programs: dict[Any, Any] = field(default_factory=dict)

    def sizes(self, model: str) -> Sizes:
        """What is measured of a model."""
        return rehearsal_sizes(model) if self.rehearse else real_sizes(model)

    @property
    def limits(self) -> Ceilings:
        """The ceilings.

        Raises:
            JobError: Nobody measured them.
        """
        if self.ceilings is None:
            raise JobError("the device's ceilings are not in the record; measure `ceilings` first")
        return self.ceilings

    def compile(self, function: Any, *, mode: str | None = None, dynamic: bool = False) -> Any:
        """torch.compile; in a rehearsal traced, and run without generated code."""
        if self.rehearse:
            return torch.compile(function, backend="aot_eager", dynamic=dynamic, fullgraph=True)
        return torch.compile(function, mode=mode, dynamic=dynamic, fullgraph=True)


@dataclass
class Outcome:
    """Of one measure: rows with targets, figures of every contestant, raw samples in µs, notes, tables.

    `failed` says why nothing stands, where it does.
    """

    rows: list[Row] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    failed: str | None = None


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to compute something.

    Attributes:
        name: In records.
        parity: Compares its result with the reference; called before anything is timed.
        run: Makes the thing to time.
    """

    name: str
    parity: Callable[[], Parity]
    run: Callable[[], Run]


def compete(
    context: Context,
    outcome: Outcome,
    case: str,
    contestants: Sequence[Contestant],
    work: Work,
    dtype: str,
    *,
    launched: Mapping[str, int | None] = MappingProxyType({OURS: None}),
    **extra: Any,
) -> Blocks:
    """Judges, then times in turn; adds a figure per contestant to the outcome. Gives the samples of those that ran.

    Args:
        context: Of the run.
        outcome: Takes figures and samples.
        case: Names what is computed.
        contestants: Each is judged before it is timed; who fails or cannot run is recorded without times.
        work: For floor, achieved rates and prediction.
        dtype: Of the operands.
        launched: Which contestants are ours, and how many kernels each launches; None for one for each of the work's
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
            judged[contestant.name] = contestant.parity()
            if not judged[contestant.name].passed:
                outcome.figures.append({**figure, "failed": "parity", "parity": judged[contestant.name].plain()})
                context.progress(f"{case}: {contestant.name} is not the reference's: {judged[contestant.name]}")
                continue
            runs[contestant.name] = contestant.run()
        except Exception as error:
            lost_context(error)
            outcome.figures.append({**figure, "failed": reason(error)})
            context.progress(f"{case}: {contestant.name} cannot run: {reason(error)}")
            if contestant.name in launched:
                traceback.print_exc(file=sys.stderr)
    missing = [name for name in ours if name not in runs]
    if missing:
        outcome.failed = f"{case}: {' and '.join(missing)} failed; see the figures"
    blocks = context.timer.blocks(runs) if runs else {}
    for name, samples in blocks.items():
        time = typical(samples)
        outcome.figures.append(
            {
                "case": case,
                "contestant": name,
                "seconds": dataclasses.asdict(time),
                "predicted": predicted.get(name),
                **({"launches": launched[name]} if launched.get(name) else {}),
                "floor": floor,
                "flops": work.flops,
                "bytes": work.bytes,
                "flops_per_second": work.flops / time.value,
                "bytes_per_second": work.bytes / time.value,
                "share_of_matmul": work.flops / time.value / limits.matmul[dtype],
                "share_of_copy": work.bytes / time.value / limits.copy,
                "parity": judged[name].plain(),
                **extra,
            }
        )
    outcome.samples[case] = microseconds(blocks)
    context.progress(f"{case}: " + ", ".join(f"{n} {1e6 * typical(b).value:.1f}" for n, b in blocks.items()) + " µs")
    return blocks


def reason(error: BaseException) -> str:
    """The first line of an error, with its kind."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


class LostContextError(JobError):
    """The device's context is lost: nothing more can run in this process."""


def lost_context(error: BaseException) -> None:
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


def faster_row(what: str, blocks: Blocks, others: Sequence[str], *, target: float | None) -> Row | None:
    """How many times faster ours is than the fastest of the others that ran; None where a side is missing."""
    there = [name for name in others if name in blocks]
    if OURS not in blocks or not there:
        return None
    best = min(there, key=lambda name: typical(blocks[name]).value)
    ratio = times_faster(blocks[OURS], blocks[best])
    return estimated(ratio, what=f"{what}, times faster than {best}", unit="", target=target, at_least=True)


def seconds_row(what: str, time: Estimate, *, prediction: float, target: float | None = None) -> Row:
    """A time in milliseconds."""
    fields: Mapping[str, Any] = {"prediction": 1e3 * prediction, "reckoning": PREDICTION}
    return estimated(time, scale=1e3, what=what, unit="ms", target=target, **fields)
