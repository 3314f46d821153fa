"""Measures of kernels: each against eager PyTorch and the libraries' attentions, at every layer's shape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from benchmarks.gpu import ways
from benchmarks.gpu.cases import (
    Case,
    LinearCase,
    calls_of,
    candidate_cases,
    draw,
    ffn_cases,
    history_cases,
    linear_cases,
)
from benchmarks.gpu.measure import OURS, Contestant, Context, Outcome, compete, faster_row
from benchmarks.gpu.parity import OTHERS, Parity, compare
from benchmarks.gpu.timing import Blocks, Run, clear
from benchmarks.gpu.ways import Way
from benchmarks.measure import Row

HISTORY_TARGET = 1.0
CANDIDATE_TARGET = 1.5
MASKED = "prepared layouts and masks of the other ways, and K and V expanded per candidate, are not in their times"


def measure_cases(
    context: Context, what: str, dtype: str, cases: Sequence[Case], others: Callable[[Case], list[Way]]
) -> tuple[Outcome, dict[str, Blocks]]:
    """Our kernel, and eager PyTorch and others beside it, case by case.

    Args:
        context: Of the run.
        what: Names op, model and dtype.
        dtype: `float16` or `bfloat16`.
        cases: Shapes.
        others: The other ways of a case.
    """
    outcome = Outcome(notes=[MASKED])
    blocks = {}
    for case in cases:
        name = f"{what}, {case.name}"
        calls = 1 if context.rehearse else calls_of(case.work)
        inputs = [draw(case, index, context.device, getattr(torch, dtype)) for index in range(calls)]
        gold, plain = ways.reference(case, inputs[0], double=True), ways.reference(case, inputs[0])
        rows = ways.rounding(case, inputs[0])
        judge = functools.partial(compare, plain=plain, gold=gold, rounding=rows)
        found = [
            contestant(
                context, way, inputs, functools.partial(judge, slack=OTHERS) if way.name != OURS else judge, case
            )
            for way in (ways.ours(case), ways.eager(case), *others(case))
        ]
        blocks[case.name] = compete(context, outcome, name, found, case.work, dtype, calls=calls)
        del inputs, gold, plain, rows, judge, found
        clear()
    return outcome, blocks


def contestant(
    context: Context, way: Way, inputs: Sequence[Any], judge: Callable[..., Parity], case: Case
) -> Contestant:
    """A way on inputs of its own for every call in a graph; our kernel is judged on memory full of NaN."""
    prepared: list[Any] = []

    def parity() -> Parity:
        prepared.append(way.prepare(inputs[0]))
        if way.name == OURS:
            out = ways.launch_ours(case, inputs[0], ways.empty_result(case, inputs[0]).fill_(float("nan")))
        else:
            out = way.finish(way.run(prepared[0]))
        if way.name == "bmm alone":
            x, w = inputs[0].arguments[:2]
            return judge(out, plain=torch.bmm(x, w), gold=torch.bmm(x.double(), w.double()))
        return judge(out)

    def run() -> Run:
        prepared.extend(way.prepare(each) for each in inputs[1:])
        return context.timer.graph([functools.partial(way.run, given) for given in prepared])

    return Contestant(name=way.name, parity=parity, run=run)


def history_attention(context: Context, model: str, dtype: str) -> Outcome:
    """history_attention against every SDPA backend."""
    backends = sdpa_backends(context)
    outcome, blocks = measure_cases(
        context,
        f"history_attention, {model}, {dtype}",
        dtype,
        history_cases(context.sizes(model)),
        lambda case: ways.sdpa(case, backends),
    )
    what = f"history_attention, {model}, {dtype}, worst of {len(blocks)} shapes"
    outcome.rows += least(what, blocks, backends, HISTORY_TARGET)
    return outcome


def candidate_attention(context: Context, model: str, dtype: str) -> Outcome:
    """candidate_attention against SDPA on K and V expanded for every candidate, the expansion part of it or not."""
    backends = sdpa_backends(context)
    sizes = context.sizes(model)
    outcome, blocks = measure_cases(
        context,
        f"candidate_attention, {model}, {dtype}",
        dtype,
        candidate_cases(sizes),
        lambda case: ways.sdpa(case, backends),
    )
    for C in sizes.candidates:
        mine = {name: found for name, found in blocks.items() if name.startswith(f"C = {C},")}
        what = f"candidate_attention, {model}, {dtype}, C = {C}, worst of {len(mine)} layers"
        outcome.rows += least(what, mine, backends, CANDIDATE_TARGET)
    return outcome


def mixed_linear(context: Context, model: str, dtype: str) -> Outcome:
    """mixed_linear against cuBLAS: with norm and residual apart, and the product alone."""

    def others(case: Case) -> list[Way]:
        assert isinstance(case, LinearCase)
        return [ways.product_alone(case)]

    cases = linear_cases(context.sizes(model))
    return measure_cases(context, f"mixed_linear, {model}, {dtype}", dtype, cases, others)[0]


def mixed_ffn(context: Context, model: str, dtype: str) -> Outcome:
    """mixed_ffn against cuBLAS."""
    cases = ffn_cases(context.sizes(model))
    return measure_cases(context, f"mixed_ffn, {model}, {dtype}", dtype, cases, lambda case: [])[0]


def history_flex(context: Context, model: str, dtype: str) -> Outcome:
    """history_attention against FlexAttention, compiled for the first shape of its own, for the others once."""
    cases = history_cases(context.sizes(model))
    outcome, blocks = measure_cases(
        context, f"history_attention, {model}, {dtype}", dtype, cases, _flex(context, cases[0])
    )
    outcome.rows += least(f"history_attention, {model}, {dtype}, worst of {len(blocks)} shapes", blocks, ["flex"], None)
    outcome.notes.append(f"FlexAttention is compiled for {cases[0].name} alone, and with dynamic shapes for the others")
    return outcome


def candidate_flex(context: Context, model: str, dtype: str) -> Outcome:
    """candidate_attention against FlexAttention over the first layer's window."""
    sizes = context.sizes(model)
    cases = [case for case in candidate_cases(sizes) if "layer 0:" in case.name]
    (first,) = (case for case in cases if case.candidates == sizes.request)
    name = f"candidate_attention, {model}, {dtype}"
    outcome, blocks = measure_cases(context, name, dtype, cases, _flex(context, first))
    for case in cases:
        what = f"{name}, {case.name}"
        outcome.rows += least(what, {case.name: blocks[case.name]}, ["flex"], CANDIDATE_TARGET)
    outcome.notes.append(f"FlexAttention is compiled for {first.name} alone, and with dynamic shapes for the others")
    return outcome


def _flex(context: Context, static: Case) -> Callable[[Any], list[Way]]:
    def compile_for(case: Case) -> Callable[[Any], Any]:
        if context.rehearse:
            return lambda function: function
        return functools.partial(context.compile, dynamic=case != static)

    return lambda case: [ways.flex(case, compile_for(case))]


def by_compiler(context: Context, model: str, dtype: str) -> Outcome:
    """Every op against torch.compile of its reference."""
    sizes = context.sizes(model)
    total = Outcome(notes=["the first shape of each op is compiled alone, the others with dynamic shapes"])
    groups: dict[str, Sequence[Case]] = {
        "history_attention": history_cases(sizes),
        "candidate_attention": [case for case in candidate_cases(sizes) if "layer 0:" in case.name],
        "mixed_linear": [case for case in linear_cases(sizes) if case.rows in (1, sizes.request, sizes.history)],
        "mixed_ffn": [case for case in ffn_cases(sizes) if case.rows in (1, sizes.request, sizes.history)],
    }
    for op, cases in groups.items():
        torch.compiler.reset()
        first = next((case for case in cases if f"C = {sizes.request}" in case.name), cases[0])

        def others(case: Case, first: Case = first) -> list[Way]:
            return [ways.compiled(case, functools.partial(context.compile, dynamic=case != first))]

        outcome, _ = measure_cases(context, f"{op}, {model}, {dtype}", dtype, cases, others)
        total.figures += outcome.figures
        total.samples |= outcome.samples
        total.failed = total.failed or outcome.failed
    torch.compiler.reset()
    return total


def sdpa_backends(context: Context) -> dict[str, SDPBackend]:
    """The backends that need a GPU; in a rehearsal the one that does not."""
    if context.rehearse:
        context.progress(f"skipped, since they need a GPU: {', '.join(ways.SDPA)}; sdpa-math stands for them")
        return {"sdpa-math": SDPBackend.MATH}
    return ways.SDPA


def least(what: str, blocks: dict[str, Blocks], others: Any, target: float | None) -> list[Row]:
    """The case in which ours is the fewest times faster than the best of the others, as a row."""
    rows = {name: faster_row(f"{what} ({name})", found, list(others), target=target) for name, found in blocks.items()}
    there = {name: row for name, row in rows.items() if row is not None}
    if not there:
        return []
    if any(OURS not in found for found in blocks.values()):
        return []
    return [min(there.values(), key=lambda row: row.value)]
