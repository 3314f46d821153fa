"""Measures of kernels: each against eager PyTorch and the libraries' attentions, at every layer's shape."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from benchmarks.contestants import kernels as providers
from benchmarks.contestants.kernels import (
    CANDIDATES,
    FFN,
    HISTORY,
    LINEAR,
    SDPA,
    Case,
    Inputs,
    Provider,
    draw,
    reference,
)
from benchmarks.context import Context, Sizes
from benchmarks.reckoning import windows
from onetrans.bench.competition import OTHERS, OURS, Contestant, Parity, compare, compete, faster_row
from onetrans.bench.rates import Work
from onetrans.bench.suite import Outcome
from onetrans.bench.timing import Blocks, Run, clear
from onetrans.precision import precision

TARGETS = {HISTORY: 1.0, CANDIDATES: 1.5}
CALL_BYTES = 64 << 20  # so much in all the calls of one graph
MOST_CALLS = 8
MASKED = "prepared layouts and masks of other providers, and K and V expanded per candidate, are not in their times"


def cases_of(op: str, sizes: Sizes) -> list[Case]:
    """An op's cases, each shape once."""
    cases = {HISTORY: _histories, CANDIDATES: _candidates, LINEAR: _linears, FFN: _ffns}[op](sizes)
    return distinct(cases)


def distinct(cases: Iterable[Case]) -> list[Case]:
    """The first case of each shape."""
    found: dict[Case, Case] = {}
    for case in cases:
        found.setdefault(dataclasses.replace(case, name=""), case)
    return list(found.values())


def _histories(sizes: Sizes) -> Iterable[Case]:
    """Every layer's attention in a fresh prefill of a full history, and in an append."""
    config = sizes.config
    shared: dict[str, Any] = {"H": config.heads, "E": config.head_dim}
    fresh, appended = windows(config, sizes.history), windows(config, sizes.before + sizes.new)
    for layer, (N, queries) in enumerate(itertools.pairwise(fresh)):
        yield Case(op=HISTORY, name=f"prefill, layer {layer}: {queries} of {N}", rows=queries, N=N, **shared)
    for layer, N in enumerate(appended[:-1]):
        yield Case(op=HISTORY, name=f"append, layer {layer}: {sizes.new} of {N}", rows=sizes.new, N=N, **shared)


def _candidates(sizes: Sizes) -> Iterable[Case]:
    """Every layer's attention in decodes of few and many candidates."""
    config = sizes.config
    shared: dict[str, Any] = {"P": config.l_ns, "H": config.heads, "E": config.head_dim}
    for C in sizes.candidates:
        for layer, N in enumerate(windows(config, sizes.history)):
            yield Case(op=CANDIDATES, name=f"C = {C}, layer {layer}: window {N}", rows=C, N=N, **shared)


def _shared_rows(sizes: Sizes) -> Iterable[tuple[str, int]]:
    yield from (("prefill", rows) for rows in dict.fromkeys(windows(sizes.config, sizes.history)))
    yield "append", sizes.new


def _linears(sizes: Sizes) -> Iterable[Case]:
    """The projections of decode, prefill and append."""
    d, P = sizes.config.d, sizes.config.l_ns
    for C in sizes.candidates:
        name, shared = f"decode, C = {C}", dict[str, Any](P=P, rows=C, D=d)
        yield Case(op=LINEAR, name=f"{name}: QKV", F=3 * d, gain=True, **shared)
        yield Case(op=LINEAR, name=f"{name}: output", F=d, residual=True, **shared)
    for part, rows in _shared_rows(sizes):
        name, shared = f"{part}, {rows} rows", dict[str, Any](rows=rows, D=d)
        yield Case(op=LINEAR, name=f"{name}: KV", F=2 * d, gain=True, **shared)
        yield Case(op=LINEAR, name=f"{name}: Q", F=d, gain=True, **shared)
        yield Case(op=LINEAR, name=f"{name}: output", F=d, residual=True, **shared)


def _ffns(sizes: Sizes) -> Iterable[Case]:
    """The feed-forwards of decode, prefill and append."""
    config, d = sizes.config, sizes.config.d
    shared: dict[str, Any] = {"D": d, "F": config.ffn_ratio * d}
    for C in sizes.candidates:
        yield Case(op=FFN, name=f"decode, C = {C}", P=config.l_ns, rows=C, **shared)
    for part, rows in _shared_rows(sizes):
        yield Case(op=FFN, name=f"{part}, {rows} rows", rows=rows, **shared)


def calls_of(context: Context, work: Work) -> int:
    """How many calls, on inputs of their own, one graph holds."""
    return 1 if context.rehearse else max(1, min(MOST_CALLS, CALL_BYTES // work.bytes))


def measure_cases(
    context: Context, name: str, dtype: str, cases: Sequence[Case], others: Callable[[Case], list[Provider]]
) -> tuple[Outcome, dict[str, Blocks]]:
    """Our kernel, and eager PyTorch and others beside it, case by case; also the samples of each case."""
    outcome, blocks = Outcome(notes=[MASKED]), {}
    for case in cases:
        calls = calls_of(context, case.work)
        inputs = [draw(case, index, context.device, precision(dtype).torch) for index in range(calls)]
        plain = reference(case, inputs[0])
        judge = functools.partial(compare, plain=plain, reference=reference(case, inputs[0], double=True))
        judge = functools.partial(judge, rounding=inputs[0].rounding)
        each = (*providers.ours_and_eager(case), *others(case))
        found = [_contestant(context, provider, inputs, judge, case) for provider in each]
        title = f"{name}, {case.name}"
        blocks[case.name] = compete(context, outcome, title, found, case.work, dtype, {OURS: None}, calls=calls)
        del inputs, plain, judge, found
        clear()
    return outcome, blocks


def _contestant(
    context: Context, provider: Provider, inputs: Sequence[Inputs], judge: Callable[..., Parity], case: Case
) -> Contestant:
    """A provider on inputs of its own for every call in a graph; our kernel is judged on memory full of NaN."""
    prepared: list[Any] = []

    def parity() -> Parity:
        prepared.append(provider.prepare(inputs[0]))
        if provider.name == OURS:
            return judge(providers.launch(case, inputs[0], inputs[0].empty().fill_(float("nan"))))
        out = provider.finish(provider.run(prepared[0]))
        if provider.name == providers.ALONE:
            x, w = inputs[0].arguments[:2]
            return judge(out, plain=torch.bmm(x, w), reference=torch.bmm(x.double(), w.double())).loosened(OTHERS)
        return judge(out).loosened(OTHERS)

    def run() -> Run:
        prepared.extend(provider.prepare(each) for each in inputs[1:])
        return context.timer.graph([functools.partial(provider.run, given) for given in prepared])

    return Contestant(name=provider.name, parity=parity, run=run)


def _least(outcome: Outcome, name: str, blocks: Mapping[str, Blocks], others: Iterable[str], op: str) -> None:
    """Adds the case in which ours is the fewest times faster than the best of the others, where it ran in all."""
    if all(OURS in found for found in blocks.values()):
        target, others = TARGETS[op], list(others)
        rows = [faster_row(f"{name} ({case})", found, others, target) for case, found in blocks.items()]
        there = [row for row in rows if row is not None]
        outcome.rows += [min(there, key=lambda row: row.value)] if there else []


def _against(context: Context, op: str, model: str, dtype: str, cases: list[Case], rivals: Any, names: Any) -> Outcome:
    """An attention against rivals: the worst shape, of candidates for each number of them."""
    name = f"{op}, {model}, {dtype}"
    outcome, blocks = measure_cases(context, name, dtype, cases, rivals)
    if op == HISTORY:
        _least(outcome, f"{name}, worst of {len(blocks)} shapes", blocks, names, op)
        return outcome
    for C in context.sizes(model).candidates:
        mine = {case: found for case, found in blocks.items() if case.startswith(f"C = {C},")}
        _least(outcome, f"{name}, C = {C}, worst of {len(mine)} layers", mine, names, op)
    return outcome


def attention(context: Context, op: str, model: str, dtype: str) -> Outcome:
    """An attention against SDPA; candidates over K and V expanded for each, the expansion part of it or not."""
    backends = SDPA
    if context.rehearse:
        context.progress(f"skipped, since they need a GPU: {', '.join(SDPA)}; sdpa-math stands for them")
        backends = {"sdpa-math": SDPBackend.MATH}
    cases = cases_of(op, context.sizes(model))
    return _against(context, op, model, dtype, cases, lambda case: providers.sdpa(case, backends), backends)


def products(context: Context, op: str, model: str, dtype: str) -> Outcome:
    """mixed_linear or mixed_ffn against cuBLAS: with norm and residual apart, and of mixed_linear the product alone."""
    cases = cases_of(op, context.sizes(model))
    alone = [providers.product_alone()] if op == LINEAR else []
    return measure_cases(context, f"{op}, {model}, {dtype}", dtype, cases, lambda case: alone)[0]


def flex_attention(context: Context, op: str, model: str, dtype: str) -> Outcome:
    """An attention against FlexAttention, compiled for the first shape alone, for the others once."""
    sizes = context.sizes(model)
    cases = [case for case in cases_of(op, sizes) if op == HISTORY or "layer 0:" in case.name]
    first = next((case for case in cases if op == CANDIDATES and case.rows == sizes.request), cases[0])

    def others(case: Case) -> list[Provider]:
        compiler = functools.partial(context.compile, dynamic=case != first)
        return [providers.flex(case, (lambda function: function) if context.rehearse else compiler)]

    outcome = _against(context, op, model, dtype, cases, others, ["flex"])
    if op == HISTORY:  # whose target is stated against SDPA
        outcome.rows = [dataclasses.replace(row, target=None) for row in outcome.rows]
    outcome.notes.append(f"FlexAttention is compiled for {first.name} alone, and with dynamic shapes for the others")
    return outcome


def by_compiler(context: Context, model: str, dtype: str) -> Outcome:
    """Every op against torch.compile of its reference."""
    sizes, total = context.sizes(model), Outcome()
    total.notes.append("the first shape of each op is compiled alone, the others with dynamic shapes")
    for op in (HISTORY, CANDIDATES, LINEAR, FFN):
        cases = cases_of(op, sizes)
        if op == CANDIDATES:
            cases = [case for case in cases if "layer 0:" in case.name]
        elif op != HISTORY:
            cases = [case for case in cases if case.rows in (1, sizes.request, sizes.history)]
        torch.compiler.reset()
        first = next((case for case in cases if f"C = {sizes.request}" in case.name), cases[0])

        def others(case: Case, first: Case = first) -> list[Provider]:
            return [providers.compiled(case, functools.partial(context.compile, dynamic=case != first))]

        outcome, _ = measure_cases(context, f"{op}, {model}, {dtype}", dtype, cases, others)
        total.figures += outcome.figures
        total.samples |= outcome.samples
        total.failed = total.failed or outcome.failed
    torch.compiler.reset()
    return total
