"""Measures of programs: prefill, append, decode and whole requests, by our kernels in CUDA graphs and by others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.contestants.programs import ModelPrograms, build
from benchmarks.context import Context
from benchmarks.reckoning import append_products, decode_products, prefill_products, windows
from onetrans.bench import competition
from onetrans.bench.competition import OTHERS, OURS, Contestant, Parity, Values, compare_programs
from onetrans.bench.rates import PREDICTION, Work, work_of
from onetrans.bench.suite import Outcome, estimated
from onetrans.bench.timing import Blocks, Run, clear, kernel_times, typical
from onetrans.export.execute import by_name, call, launches, run
from onetrans.export.program import Program
from onetrans.kernels.jit import interpreted

PREFILL_TARGET = {("onetrans-s", "bfloat16"): 0.30, ("onetrans-s", "float16"): 0.30}  # ms
DECODE_TARGET = {("onetrans-l", "bfloat16"): 1.6}  # times its floor
REQUEST_TARGET = 3.0
UNSPLIT = "unsplit, torch.compile"
FUSED = f"{OURS}, torch.compile around them"
Timed = tuple[Blocks, Work, str, tuple[str, int | None]]  # with the last of ours and its launches
FUSED_LAUNCHES = {"prefill": 5, "append": 5, "decode": 11}  # outside our kernels, as Inductor of torch 2.11 emits them


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One computation of a program."""

    name: str
    kind: str
    C: int = 0
    given: Values  # inputs of the captured program
    own: Values  # inputs of the lowered one
    judge: Callable[[Values], Parity]  # compares the captured program's outputs with float64
    judge_ours: Callable[[Values], Parity]  # compares what the lowered program leaves
    poison: Callable[[], None] = field(default=lambda: None)  # fills with NaN what the lowered program is to write
    work: Work


def _prefill(m: ModelPrograms, dtype: str) -> Trial:
    events = m.sizes.prefill
    state, given = m.prefilled(events), m.inputs("prefill", events=events)

    def judge(values: Values) -> Parity:
        cut = {n: v[:, : state.reference[n].shape[1]] if v.dim() == 4 else v for n, v in values.items()}
        return compare_programs(cut, state.plain, state.reference, m.dtype)

    products = prefill_products(m.sizes.config, windows(m.sizes.config, events), visible_only=True)
    return Trial(
        name=f"prefill of {events} events",
        kind="prefill",
        given=given,
        own={**given, **state.slabs},
        judge=judge,
        judge_ours=lambda values: m.judge_prefill(state, values),
        poison=lambda: m.poison(state.slabs, {}),
        work=work_of(products, dtype),
    )


def _append(m: ModelPrograms, dtype: str) -> Trial:
    sizes, before = m.sizes, m.prefilled(m.sizes.before)
    given, first = m.append_inputs(before.plain), m.tokens(before.reference)
    plain = run(m.plain["append"], given)
    reference = run(m.reference["append"], m.append_inputs(before.reference))
    after = {name: count - sizes.new for name, count in m.tokens(reference).items()}
    assert first == after, "the append is not exact: a window moved"

    def judge_ours(values: Values) -> Parity:
        return compare_programs(m.from_slabs(values, before.slabs, reference, first), plain, reference, m.dtype)

    return Trial(
        name=f"append of {sizes.new} events to {sizes.before}",
        kind="append",
        given=given,
        own={**m.inputs("append", events=sizes.new, start=sizes.before), **before.slabs},
        judge=lambda values: compare_programs(values, plain, reference, m.dtype),
        judge_ours=judge_ours,
        poison=lambda: m.poison(before.slabs, first),
        work=work_of(append_products(sizes.config, sizes.before, sizes.new), dtype),
    )


def _decode(m: ModelPrograms, dtype: str, C: int) -> Trial:
    state = m.prefilled(m.sizes.prefill)
    given = m.decode_inputs(state.plain, C)
    plain = run(m.plain["decode"], given)
    reference = run(m.reference["decode"], m.decode_inputs(state.reference, C))

    def judge(values: Values) -> Parity:
        return compare_programs(values, plain, reference, m.dtype)

    config = m.sizes.config
    return Trial(
        name=f"decode of {C} candidates",
        kind="decode",
        C=C,
        given=given,
        own={**m.inputs("decode", candidates=C), **state.ours, **state.slabs},
        judge=judge,
        judge_ours=judge,
        work=work_of(decode_products(config, windows(config, m.sizes.prefill), C), dtype),
    )


def program(context: Context, kind: str, model: str, dtype: str, modes: tuple[str, ...] = (), only: int = 0) -> Outcome:
    """A program by our kernels against eager, or against torch.compile in each of `modes`.

    With modes, ours competes once more with what lies between its kernels compiled. Decode takes every number of
    candidates, or `only` that many.
    """
    m, outcome = build(context, model, dtype), Outcome()
    request = m.sizes.request
    if kind == "decode":
        counts = m.sizes.candidates if not only else (request if context.rehearse else only,)
        makers: list[Callable[[], Trial]] = [lambda C=C: _decode(m, dtype, C) for C in counts]  # type: ignore[misc]
    else:
        makers = [lambda: {"prefill": _prefill, "append": _append}[kind](m, dtype)]
    profiled = []
    for make in makers:
        trial = make()
        name = f"{trial.name}, {model}, {dtype}"
        launched: dict[str, int | None] = {OURS: launches(m.kernels[kind])}
        fuses = bool(modes) and not interpreted()  # a compiler does not see into interpreted kernels
        if fuses:
            launched[FUSED] = launches(m.kernels[kind], only="onetrans_triton.") + FUSED_LAUNCHES[kind]
        contestants = [_replayed(context, OURS, m.kernels[kind], trial)]
        contestants += [_replayed(context, FUSED, m.kernels[kind], trial, compiled=True)] if fuses else []
        contestants += _others(context, m.plain[kind], trial, modes)
        blocks = competition.compete(context, outcome, name, contestants, trial.work, dtype, launched)
        timed = blocks, trial.work, dtype, list(launched.items())[-1]
        requested = kind != "decode" or request == trial.C
        targets: dict[Any, float] = {"prefill": PREFILL_TARGET, "decode": DECODE_TARGET}.get(kind, {})
        target = None if context.rehearse else targets.get((model, dtype))
        _report(context, outcome, name, timed, target if kind == "prefill" else None)
        if kind == "decode" and requested:
            _over_floor(context, outcome, name, timed, target)
        if requested:
            profiled.append((name, trial.own))
        del trial, contestants, blocks
        clear()
    for name, own in profiled:  # last, lest the profiler be in the way of what is timed
        if not context.rehearse:
            try:
                outcome.tables[f"{name}: device time by kernel"] = kernel_times(call(m.kernels[kind], own))
            except Exception as error:
                outcome.notes.append(f"{name}: no profile, {competition.reason(error)}")
    return outcome


def request(context: Context, model: str, dtype: str, mode: str | None = None) -> Outcome:
    """Prefill and decode, against one unsplit forward of all candidates, eager or by torch.compile."""
    m, outcome = build(context, model, dtype), Outcome()
    sizes, C = m.sizes, m.sizes.request
    state, decode = m.prefilled(sizes.prefill), _decode(m, dtype, m.sizes.request)
    given = {**m.inputs("prefill", events=sizes.prefill), **state.slabs}
    whole = m.inputs("whole", events=sizes.prefill, candidates=C)
    first = context.timer.graph([call(m.kernels["prefill"], given)])
    left = {**by_name(m.kernels["prefill"], first.kept[1][0]), **state.slabs}
    second: list[Run] = []

    def parity() -> Parity:
        inputs = {**m.inputs("decode", candidates=C), **left}
        second.append(context.timer.graph([call(m.kernels["decode"], inputs)]))
        first.go()
        second[0].go()
        return decode.judge_ours(by_name(m.kernels["decode"], second[0].kept[1][0]))

    def both() -> None:
        first.go()
        second[0].go()

    name = f"{UNSPLIT} {mode}" if mode else "unsplit, eager"
    module = context.compile(m.plain["whole"].module, mode=mode) if mode else None
    contestants = [
        Contestant(name=OURS, parity=parity, run=lambda: Run(go=both, kept=(first, *second))),
        _called(context, name, m.plain["whole"], call(m.plain["whole"], whole, module), decode.judge),
    ]
    config, title = sizes.config, f"request of {sizes.prefill} events and {C} candidates, {model}, {dtype}"
    prefill = prefill_products(config, windows(config, sizes.prefill), visible_only=True)
    work = work_of(prefill, dtype) + decode.work
    launched: dict[str, int | None] = {OURS: sum(launches(m.kernels[kind]) for kind in ("prefill", "decode"))}
    blocks = competition.compete(context, outcome, title, contestants, work, dtype, launched)
    _report(context, outcome, title, (blocks, work, dtype, (OURS, launched[OURS])))
    if mode is not None:
        row = competition.faster_row(title, blocks, [name], REQUEST_TARGET if mode == "max-autotune" else None)
        outcome.rows += [row] if row is not None else []
        if row is None and not outcome.failed:
            outcome.failed = f"{title}: {name} did not run"
    return outcome


def _replayed(context: Context, name: str, lowered: Program, trial: Trial, *, compiled: bool = False) -> Contestant:
    """A lowered program in a CUDA graph, judged by what its replay leaves behind in memory full of NaN."""
    go = call(lowered, trial.own, context.compile(lowered.module) if compiled else None)
    made: list[Run] = []

    def parity() -> Parity:
        with torch.no_grad():
            made.append(context.timer.graph([go]))
        for value in made[0].kept[1][0]:
            value.fill_(float("nan") if value.is_floating_point() else -1)
        trial.poison()
        if context.rehearse:  # which has no graphs, whose replay would write to the same memory
            return trial.judge_ours(by_name(lowered, go()))
        made[0].go()
        return trial.judge_ours(by_name(lowered, made[0].kept[1][0]))

    return Contestant(name=name, parity=parity, run=lambda: made[0])


def _others(context: Context, plain: Program, trial: Trial, modes: tuple[str, ...]) -> list[Contestant]:
    """Eager, or where modes are named, torch.compile in each of them."""
    if not modes:
        return [_called(context, "eager", plain, call(plain, trial.given), trial.judge)]
    made = {f"torch.compile {mode}": context.compile(plain.module, mode=mode) for mode in modes}
    goes = {name: call(plain, trial.given, module) for name, module in made.items()}
    return [_called(context, name, plain, go, trial.judge) for name, go in goes.items()]


def _called(
    context: Context, name: str, plain: Program, go: Callable[[], Any], judge: Callable[[Values], Parity]
) -> Contestant:
    """Something that Python calls; what its memory held before a call may be gone after it."""

    def step() -> Any:
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            return go()

    def parity() -> Parity:
        return judge({name: value.clone() for name, value in by_name(plain, step()).items()}).loosened(OTHERS)

    return Contestant(name=name, parity=parity, run=lambda: context.timer.plain(step))


def _report(context: Context, outcome: Outcome, name: str, timed: Timed, target: float | None = None) -> None:
    """A row of our time, of the last of ours, with where it goes."""
    blocks, work, dtype, (ours, count) = timed
    if ours not in blocks:
        return
    limits, time, title = context.limits, typical(blocks[ours]), name + ours.removeprefix(OURS)
    told: dict[str, Any] = {"prediction": 1e3 * limits.predict(work, dtype, count), "reckoning": PREDICTION}
    outcome.rows.append(estimated(time, title, "ms", scale=1e3, target=target, **told))
    arithmetic, moving = work.flops / limits.matmul[dtype], work.bytes / limits.copy
    outcome.notes.append(
        f"{title}: {1e6 * time.value:.0f} µs; arithmetic at the product's rate takes {1e6 * arithmetic:.0f} µs, bytes"
        f" at the copy's {1e6 * moving:.0f} µs, {count} launches {1e6 * (count or 0) * limits.launch:.0f} µs"
    )


def _over_floor(context: Context, outcome: Outcome, name: str, timed: Timed, target: float | None) -> None:
    """The same over the larger of weight bytes and operations at the measured rates."""
    blocks, work, dtype, (ours, count) = timed
    if ours in blocks:
        floor = context.limits.weight_floor(work, dtype)
        title = f"{name}{ours.removeprefix(OURS)}, over its floor of {1e3 * floor:.3f} ms"
        told: dict[str, Any] = {"target": target, "prediction": context.limits.predict(work, dtype, count) / floor}
        reckoning = "floor: max(weight bytes / copy rate, flops / matmul rate)"
        outcome.rows.append(estimated(typical(blocks[ours]), title, scale=1 / floor, reckoning=reckoning, **told))
