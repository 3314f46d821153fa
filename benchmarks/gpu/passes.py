"""Measures of programs: prefill, append, decode and whole requests, by our kernels in CUDA graphs and by other ways."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.gpu.cases import SLOT
from benchmarks.gpu.measure import OURS, Contestant, Context, Outcome, compete, faster_row, reason, seconds_row
from benchmarks.gpu.parity import OTHERS, Parity, Values, compare_programs
from benchmarks.gpu.programs import (
    Built,
    Chain,
    append_inputs,
    build,
    call,
    decode_inputs,
    judge_append,
    judge_prefill,
    own_append_inputs,
    own_decode_inputs,
    prefilled,
    run,
)
from benchmarks.gpu.reckoning import Work, append_work, decode_work, prefill_work
from benchmarks.gpu.timing import Blocks, Run, clear, typical
from benchmarks.measure import estimated
from onetrans.export.program import Program
from onetrans.kernels.jit import interpreted

PREFILL_TARGET = {("onetrans-s", "bfloat16"): 0.30, ("onetrans-s", "float16"): 0.30}  # ms
DECODE_TARGET = {("onetrans-l", "bfloat16"): 1.6}  # times its floor
REQUEST_TARGET = 3.0
MODES = ("reduce-overhead", "max-autotune")
UNSPLIT = "unsplit, torch.compile"
FUSED = f"{OURS}, torch.compile around them"
FUSED_LAUNCHES = {"prefill": 5, "append": 5, "decode": 11}  # outside our kernels, as Inductor of torch 2.11 emits them


def prefill(context: Context, model: str, dtype: str, *, modes: tuple[str, ...] = ()) -> Outcome:
    """A fresh history's state."""
    built, outcome = build(context, model, dtype), Outcome()
    events = built.sizes.prefill
    chain, given = prefilled(built, events), built.inputs("prefill", events=events)
    gold, plain = chain.gold, chain.plain

    def judge(values: Values) -> Parity:
        return compare_programs(_cut_like(values, gold), plain, gold, built.dtype)

    own = {**given, **chain.slabs}
    contestants = [
        *_ours(
            context,
            built,
            "prefill",
            own,
            lambda values: judge_prefill(built, _with(chain, values)),
            modes,
            poison=lambda: poison_slabs(chain.slabs, {}),
        ),
        *_others(context, built, "prefill", given, judge, modes),
    ]
    work = prefill_work(built.sizes.config, events)
    name = f"prefill of {events} events, {model}, {dtype}"
    launched = _launched(built, "prefill", modes)
    blocks = compete(context, outcome, name, contestants, work, dtype, launched=launched)
    target = None if context.rehearse else PREFILL_TARGET.get((model, dtype))
    _report(context, outcome, name, blocks, work, dtype, launched, target=target)
    _where(context, outcome, name, built, "prefill", own)
    return outcome


def append(context: Context, model: str, dtype: str, *, modes: tuple[str, ...] = ()) -> Outcome:
    """New events on a state."""
    built, outcome = build(context, model, dtype), Outcome()
    sizes = built.sizes
    before = prefilled(built, sizes.before)
    given, own = append_inputs(built, before.plain), own_append_inputs(built, before)
    gold = run(built.gold["append"], append_inputs(built, before.gold))
    plain = run(built.plain["append"], given)
    lengths = {layer: int(n) for layer, n in enumerate(before.gold["lengths"][0])}
    contestants = [
        *_ours(
            context,
            built,
            "append",
            own,
            lambda values: judge_append(built, before, values),
            modes,
            poison=lambda: poison_slabs(before.slabs, lengths),
        ),
        *_others(context, built, "append", given, lambda v: compare_programs(v, plain, gold, built.dtype), modes),
    ]
    work = append_work(sizes.config, sizes.before, sizes.new)
    name = f"append of {sizes.new} events to {sizes.before}, {model}, {dtype}"
    launched = _launched(built, "append", modes)
    blocks = compete(context, outcome, name, contestants, work, dtype, launched=launched)
    _report(context, outcome, name, blocks, work, dtype, launched)
    _where(context, outcome, name, built, "append", own)
    return outcome


def decode(
    context: Context, model: str, dtype: str, *, modes: tuple[str, ...] = (), only: int | None = None
) -> Outcome:
    """Candidates over a state; of every number of them, or of one."""
    built, outcome = build(context, model, dtype), Outcome()
    sizes = built.sizes
    chain = prefilled(built, sizes.prefill)
    profiled: list[tuple[str, Values]] = []
    if only is not None and context.rehearse:
        only = sizes.request
    for C in sizes.candidates if only is None else (only,):
        given, own = decode_inputs(built, chain.plain, C), own_decode_inputs(built, chain, C)
        gold = run(built.gold["decode"], decode_inputs(built, chain.gold, C))
        plain = run(built.plain["decode"], given)
        judge = functools.partial(compare_programs, plain=plain, gold=gold, dtype=built.dtype)
        contestants = [
            *_ours(context, built, "decode", own, judge, modes),
            *_others(context, built, "decode", given, judge, modes),
        ]
        work = decode_work(sizes.config, sizes.prefill, C)
        name = f"decode of {C} candidates, {model}, {dtype}"
        launched = _launched(built, "decode", modes)
        blocks = compete(context, outcome, name, contestants, work, dtype, launched=launched)
        _report(context, outcome, name, blocks, work, dtype, launched)
        if sizes.request == C:
            _over_floor(context, outcome, name, blocks, work, built, launched)
            profiled = [(name, own)]
        del given, own, gold, plain, judge, contestants, blocks
        clear()
    for name, own in profiled:  # last, lest the profiler be in the way of what is timed
        _where(context, outcome, name, built, "decode", own)
    return outcome


def request(context: Context, model: str, dtype: str, *, mode: str | None = None) -> Outcome:
    """Prefill and decode, against one unsplit forward of all candidates, eager or by torch.compile."""
    built, outcome = build(context, model, dtype), Outcome()
    sizes, C = built.sizes, built.sizes.request
    chain = prefilled(built, sizes.prefill)
    whole = built.inputs("whole", events=sizes.prefill, candidates=C)
    gold = run(built.gold["decode"], decode_inputs(built, chain.gold, C))
    plain = run(built.plain["decode"], decode_inputs(built, chain.plain, C))
    judge = functools.partial(compare_programs, plain=plain, gold=gold, dtype=built.dtype)
    given = {**built.inputs("prefill", events=sizes.prefill), **chain.slabs}
    first = context.timer.graph([call(built.kernels["prefill"], given)])
    second: list[Run] = []

    def parity() -> Parity:
        state = dict(zip(built.kernels["prefill"].outputs, first.kept[1][0], strict=True))
        inputs = {**built.inputs("decode", candidates=C), **state, **chain.slabs}
        second.append(context.timer.graph([call(built.kernels["decode"], inputs)]))
        _both(first, second[0])
        return judge(dict(zip(built.kernels["decode"].outputs, second[0].kept[1][0], strict=True)))

    contestants = [
        Contestant(name=OURS, parity=parity, run=lambda: Run(go=lambda: _both(first, second[0]), kept=(first, second)))
    ]
    name, module = "unsplit, eager", built.plain["whole"].module
    if mode is not None:
        name, module = f"{UNSPLIT} {mode}", context.compile(module, mode=mode)
    contestants.append(_called(context, name, call(built.plain["whole"], whole, module), built, "whole", judge))
    work = prefill_work(sizes.config, sizes.prefill) + decode_work(sizes.config, sizes.prefill, C)
    launched = {OURS: built.launches["prefill"] + built.launches["decode"]}
    what = f"request of {sizes.prefill} events and {C} candidates, {model}, {dtype}"
    blocks = compete(context, outcome, what, contestants, work, dtype, launched=launched)
    _report(context, outcome, what, blocks, work, dtype, launched)
    if mode is not None:
        row = faster_row(what, blocks, [name], target=REQUEST_TARGET if mode == "max-autotune" else None)
        outcome.rows += [row] if row is not None else []
        if row is None and outcome.failed is None:
            outcome.failed = f"{what}: {name} did not run"
    return outcome


def _both(first: Run, second: Run) -> None:
    first.go()
    second.go()


def _ours(
    context: Context,
    built: Built,
    kind: str,
    own: Values,
    judge: Callable[[Values], Parity],
    modes: tuple[str, ...],
    poison: Callable[[], None] = lambda: None,
) -> list[Contestant]:
    """A lowered program; where others are compiled, once more with what lies between its kernels compiled."""
    program = built.kernels[kind]
    found = [_replayed(context, OURS, program, call(program, own), judge, poison)]
    if _fuses(modes):
        found.append(
            _replayed(context, FUSED, program, call(program, own, context.compile(program.module)), judge, poison)
        )
    return found


def _replayed(
    context: Context,
    name: str,
    program: Program,
    go: Callable[[], Any],
    judge: Callable[[Values], Parity],
    poison: Callable[[], None],
) -> Contestant:
    """A program in a CUDA graph, judged by what its replay leaves behind in memory full of NaN."""
    made: list[Run] = []

    def parity() -> Parity:
        with torch.no_grad():
            made.append(context.timer.graph([go]))
        for value in made[0].kept[1][0]:
            value.fill_(float("nan") if value.is_floating_point() else -1)
        poison()
        made[0].go()
        return judge(dict(zip(program.outputs, _after(made[0], go, context), strict=True)))

    return Contestant(name=name, parity=parity, run=lambda: made[0])


def poison_slabs(slabs: Values, valid: Mapping[int, int]) -> None:
    """Fills the user's slot with NaN from token valid[layer] on, from the first where a layer is not named."""
    for name, slab in slabs.items():
        if slab.is_floating_point():
            slab[SLOT, valid.get(int(name.removeprefix(f"{name[0]}_state")), 0) :] = float("nan")


def _after(made: Run, again: Callable[[], Any], context: Context) -> Any:
    """What a replay left; in a rehearsal, which has no graphs, what another run gives."""
    return again() if context.rehearse else made.kept[1][0]


def _others(
    context: Context,
    built: Built,
    kind: str,
    given: Values,
    judge: Callable[[Values], Parity],
    modes: tuple[str, ...],
) -> list[Contestant]:
    """Eager, or where modes are named, torch.compile in each of them."""
    program = built.plain[kind]
    if not modes:
        return [_called(context, "eager", call(program, given), built, kind, judge)]
    found = []
    for mode in modes:
        compiled = context.compile(program.module, mode=mode)
        found.append(_called(context, f"torch.compile {mode}", call(program, given, compiled), built, kind, judge))
    return found


def _called(
    context: Context, name: str, go: Callable[[], Any], built: Built, kind: str, judge: Callable[[Values], Parity]
) -> Contestant:
    """Something that Python calls; what its memory held before a call may be gone after it."""

    def step() -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return go()

    def parity() -> Parity:
        with torch.no_grad():
            found = judge({n: v.clone() for n, v in zip(built.plain[kind].outputs, step(), strict=True)})
        return dataclasses.replace(found, bound=OTHERS * found.bound, relative_bound=OTHERS * found.relative_bound)

    def timed() -> None:
        with torch.no_grad():
            step()

    return Contestant(name=name, parity=parity, run=lambda: context.timer.plain(timed))


def _cut_like(values: Values, like: Values) -> Values:
    return {n: v[:, : like[n].shape[1]] if v.dim() == 4 else v for n, v in values.items()}


def _with(chain: Chain, values: Values) -> Chain:
    return Chain(plain=chain.plain, gold=chain.gold, ours=values, slabs=chain.slabs)


def _launched(built: Built, kind: str, modes: tuple[str, ...]) -> dict[str, int]:
    """Kernels that each of our ways launches, the second's as predicted; see `_ours`."""
    found = {OURS: built.launches[kind]}
    return {**found, FUSED: built.kernel_launches[kind] + FUSED_LAUNCHES[kind]} if _fuses(modes) else found


def _fuses(modes: tuple[str, ...]) -> bool:
    return bool(modes) and not interpreted()  # a compiler does not see into interpreted kernels


def _report(
    context: Context,
    outcome: Outcome,
    name: str,
    blocks: Blocks,
    work: Work,
    dtype: str,
    launched: Mapping[str, int],
    target: float | None = None,
) -> None:
    """A row of our time, of the last of our ways, with where it goes."""
    way, count = list(launched.items())[-1]
    if way not in blocks:
        return
    limits, time, title = context.limits, typical(blocks[way]), _titled(name, way)
    outcome.rows.append(seconds_row(title, time, prediction=limits.predict(work, dtype, count), target=target))
    arithmetic, moving = work.flops / limits.matmul[dtype], work.bytes / limits.copy
    outcome.notes.append(
        f"{title}: {1e6 * time.value:.0f} µs; arithmetic at the product's rate would take {1e6 * arithmetic:.0f} µs,"
        f" bytes at the copy's {1e6 * moving:.0f} µs, about {count} launches {1e6 * count * limits.launch:.0f} µs"
    )


def _over_floor(
    context: Context,
    outcome: Outcome,
    name: str,
    blocks: Blocks,
    work: Work,
    built: Built,
    launched: Mapping[str, int],
) -> None:
    """The same over the larger of weight bytes and operations at the measured rates."""
    model, dtype = built.sizes.config.name, str(built.dtype).removeprefix("torch.")
    floor = context.limits.weight_floor(work, dtype)
    way, count = list(launched.items())[-1]
    if way in blocks:
        row = estimated(
            typical(blocks[way]),
            scale=1 / floor,
            what=f"{_titled(name, way)}, over its floor of {1e3 * floor:.3f} ms",
            unit="",
            target=None if context.rehearse else DECODE_TARGET.get((model, dtype)),
            prediction=context.limits.predict(work, dtype, count) / floor,
            reckoning="floor: max(weight bytes / copy rate, flops / matmul rate)",
        )
        outcome.rows.append(row)


def _titled(name: str, way: str) -> str:
    return name + way.removeprefix(OURS)


def _where(context: Context, outcome: Outcome, name: str, built: Built, kind: str, given: Mapping[str, Any]) -> None:
    """A table of device time by kernel, of one run outside a graph."""
    if context.rehearse:
        return
    try:
        outcome.tables[f"{name}: device time by kernel"] = kernel_times(call(built.kernels[kind], given))
    except Exception as error:
        outcome.notes.append(f"{name}: no profile, {reason(error)}")


def kernel_times(go: Callable[[], Any], rounds: int = 5) -> list[list[str]]:
    """Kernel, launches and microseconds of one run, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    go()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(rounds):
            go()
        torch.cuda.synchronize()
    rows = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
    body = [
        [event.key[:80], f"{event.count / rounds:g}", f"{event.self_device_time_total / rounds:.1f}"]
        for event in rows
        if event.self_device_time_total
    ]
    return [["kernel", "launches", "µs"], *body[:20]]
