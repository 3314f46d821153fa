"""The suites and their measures in order: what each measures, how long it should take, and what it rests on."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from onetrans.bench.runner import Measure, Suite
from onetrans.bench.suite import Outcome
from onetrans.errors import ConfigError

TESTS, CEILINGS = "tests", "ceilings"
DTYPES = ("bfloat16", "float16")
MODELS = ("onetrans-s", "onetrans-l")


def suite_of(name: str) -> Suite:
    """A suite; what it needs is imported now, as torch on a GPU."""
    measures: Iterable[Measure] = {"cpu": _cpu, "gpu": _gpu, "compiled": _compiled}[name]()
    found: dict[str, Measure] = {}
    for measure in measures:
        found.setdefault(measure.name, measure)
    gpu = name == "gpu"
    needs = (TESTS, CEILINGS) if gpu else ()
    facts = {"cpu": dict, "gpu": _timed, "compiled": _tuned}[name]
    return Suite(name=name, measures=found, needs=needs, budget=450.0 if gpu else float("inf"), gpu=gpu, facts=facts)


SUITES = ("cpu", "gpu", "compiled")


def _tuned() -> dict[str, Any]:
    """The hash of the table of tuned launch configurations in force."""
    from onetrans.kernels.launch import table

    return {"tuned_sha256": hashlib.sha256(table.table_path().read_bytes()).hexdigest()}


def _timed() -> dict[str, Any]:
    """The same, and how a GPU's times are taken."""
    from onetrans.bench.timing import METHOD

    return {**_tuned(), "method": METHOD}


def _cpu() -> Iterator[Measure]:
    from benchmarks.cases import bundles, matmul, state

    yield Measure(name="export_time", seconds=190, run=bundles.export_time)
    yield Measure(name="parity", seconds=60, run=bundles.parity)
    yield Measure(name="decode_vs_matmul", seconds=45, run=matmul.decode_vs_matmul)
    yield Measure(name="prefill_vs_matmul", seconds=30, run=matmul.prefill_vs_matmul)
    yield Measure(name="request_vs_unsplit", seconds=55, run=matmul.request_vs_unsplit)
    yield Measure(name="latency", seconds=60, run=bundles.latency)
    yield Measure(name="append", seconds=55, run=state.append)
    yield Measure(name="append_growth", seconds=10, run=state.append_growth)
    yield Measure(name="returning", seconds=120, run=state.returning)
    yield Measure(name="tiers", seconds=220, run=state.tiers)
    yield Measure(name="soak", seconds=420, run=bundles.soak)


def _compiled() -> Iterator[Measure]:
    from benchmarks.cases.compiled import WIDE, compile_model
    from onetrans.kernels.ahead.compile import ARCHITECTURES
    from onetrans.kernels.jit import interpreted

    if interpreted():
        raise ConfigError("TRITON_INTERPRET is set, so that kernels are interpreted; unset it to compile them")
    for model in ("tiny", *MODELS, WIDE):
        for dtype in ("bf16", "fp16"):
            for arch in ARCHITECTURES:
                run = functools.partial(compile_model, model=model, dtype=dtype, capability=arch)
                yield Measure(name=f"{model}/{dtype}/sm_{arch}", seconds=30, run=run)


def _gpu() -> Iterator[Measure]:
    """First what the targets rest on, last what torch.compile takes long for; seconds are those of an H200."""
    from benchmarks.cases import device, kernels, programs
    from benchmarks.contestants.kernels import CANDIDATES, FFN, HISTORY, LINEAR

    runs: dict[str, tuple[Callable[..., Outcome], float, tuple[str, ...]]] = {
        "prefill": (programs.program, 25, (HISTORY, LINEAR, FFN, device.PROGRAMS)),
        "append": (programs.program, 20, (HISTORY, LINEAR, FFN, device.PROGRAMS)),
        "decode": (programs.program, 30, (CANDIDATES, LINEAR, FFN, device.PROGRAMS)),
        HISTORY: (kernels.attention, 15, (HISTORY,)),
        CANDIDATES: (kernels.attention, 25, (CANDIDATES,)),
        LINEAR: (kernels.products, 15, (LINEAR,)),
        FFN: (kernels.products, 10, (FFN,)),
    }
    every = (HISTORY, CANDIDATES, LINEAR, FFN)

    def of(
        name: str, model: str, dtype: str, seconds: float, run: Callable[..., Outcome], ops: Any, **more: Any
    ) -> Measure:
        alone, fixed = more.pop("alone", False), functools.partial(run, model=model, dtype=dtype, **more)
        title = f"{name}/{model}/{dtype}"
        return Measure(name=title, seconds=seconds, run=fixed, concerns=ops, dtype=dtype, alone=alone)

    def plain(name: str, model: str, dtype: str) -> Measure:
        run, seconds, ops = runs[name]
        return of(name, model, dtype, seconds, run, ops, **{"kind" if run is programs.program else "op": name})

    def compiled(kind: str, model: str, dtype: str, only: int = 0) -> Measure:
        name, seconds = (f"{kind}_compiled/{only}", 70) if only else (f"{kind}_compiled", 100)
        options: dict[str, Any] = {"kind": kind, "modes": ("reduce-overhead",), "only": only}
        return of(name, model, dtype, seconds, programs.program, runs[kind][2], **options)

    def flex(op: str, model: str, dtype: str) -> Measure:
        return of(f"{op.removesuffix('_attention')}_flex", model, dtype, 40, kernels.flex_attention, (op,), op=op)

    def request(model: str, dtype: str) -> Measure:
        return of("request", model, dtype, 20, programs.request, (*every, device.PROGRAMS))

    def unsplit(model: str, dtype: str) -> Measure:
        seconds, options = (240 if model == "onetrans-s" else 300), {"mode": "max-autotune", "alone": True}
        return of("request_unsplit", model, dtype, seconds, programs.request, (*every, device.PROGRAMS), **options)

    yield Measure(name=TESTS, seconds=150, run=device.run_tests)
    yield Measure(name=CEILINGS, seconds=6, run=device.ceilings)
    small, large, first = "onetrans-s", "onetrans-l", DTYPES[0]
    for name, model in (("decode", large), (CANDIDATES, large), (HISTORY, large)):
        yield plain(name, model, first)
    for name in ("prefill", CANDIDATES, HISTORY):
        yield plain(name, small, first)
    yield from (flex(CANDIDATES, model, first) for model in (large, small))
    yield request(small, first)
    yield compiled("decode", large, first, 100)
    yield compiled("prefill", small, first)
    yield unsplit(small, first)
    pairs = [(model, dtype) for dtype in DTYPES for model in MODELS]
    for pair in pairs:
        yield from (plain(kind, *pair) for kind in ("prefill", "append", "decode"))
        yield request(*pair)
    for names in ((LINEAR, FFN), (HISTORY, CANDIDATES)):
        yield from (plain(name, *pair) for pair in pairs for name in names)
    yield unsplit(large, first)
    yield from (flex(op, *pair) for pair in pairs for op in (HISTORY, CANDIDATES))
    for pair in pairs:
        yield from (compiled("decode", *pair, C) for C in (100, 1, 500, 2000))
        yield from (compiled(kind, *pair) for kind in ("prefill", "append"))
        yield of("kernels_compiled", *pair, 90, kernels.by_compiler, every)
    yield from (unsplit(model, DTYPES[1]) for model in MODELS)
