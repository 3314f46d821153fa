"""What the device gives at best: a copy, large products, and launches in a graph."""

from __future__ import annotations

import dataclasses
import functools

import torch

from benchmarks.gpu.measure import Context, Outcome
from benchmarks.gpu.reckoning import Ceilings
from benchmarks.gpu.timing import Run, clear, microseconds, typical
from benchmarks.measure import Row, estimated
from onetrans.bench.stats import Estimate

COPY_BYTES = 4 << 30
SIDE = 8192
NODES = 200  # of the graph of empty kernels
DTYPES = ("bfloat16", "float16")


def measure_ceilings(context: Context) -> Outcome:
    """A device-to-device copy, an 8192³ product on random data in both dtypes, and a graph of one-element kernels."""
    size, side, nodes = (1 << 16, 64, 4) if context.rehearse else (COPY_BYTES, SIDE, NODES)
    device, outcome = context.device, Outcome()
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    goal = torch.empty_like(source)
    runs: dict[str, Run] = {"copy": context.timer.plain(lambda: goal.copy_(source))}
    operands = {}
    for dtype in DTYPES:
        a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
        operands[dtype] = a, b, torch.empty_like(a)
        runs[dtype] = context.timer.plain(functools.partial(torch.mm, a, b, out=operands[dtype][2]))
    one = torch.zeros(1, device=device)
    runs["launch"] = context.timer.graph([functools.partial(one.add_, 1.0)] * nodes)
    blocks = context.timer.blocks(runs)
    times = {name: typical(samples) for name, samples in blocks.items()}
    flops = 2 * side**3
    rows = [("device-to-device copy, bytes read and written", "TB/s", 2 * size / 1e12, times["copy"])]
    rows += [(f"{dtype} product of {side}³, random data", "TFLOP/s", flops / 1e12, times[dtype]) for dtype in DTYPES]
    outcome.rows = [_rate(*row) for row in rows]
    outcome.rows.append(estimated(times["launch"], scale=1e6, what="one-element kernel in a graph", unit="µs"))
    ceilings = Ceilings(
        copy=2 * size / times["copy"].value,
        matmul={dtype: flops / times[dtype].value for dtype in DTYPES},
        launch=times["launch"].value,
    )
    outcome.figures = [{"ceilings": dataclasses.asdict(ceilings)}]
    outcome.samples = microseconds(blocks)
    context.ceilings = ceilings
    clear()
    return outcome


def _rate(what: str, unit: str, amount: float, time: Estimate) -> Row:
    """Amount over time; the interval's ends change places."""
    return Row(what=what, unit=unit, value=amount / time.value, low=amount / time.high, high=amount / time.low)


def read_ceilings(held: dict[str, object]) -> Ceilings:
    """Out of a measure's entry in the record."""
    figures: list[dict[str, dict[str, object]]] = held["figures"]  # type: ignore[assignment]
    return Ceilings(**figures[0]["ceilings"])  # type: ignore[arg-type]
