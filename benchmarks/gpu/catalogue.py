"""The suite's measures in order: first what the targets rest on, last what torch.compile takes long for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.gpu import kernels, passes
from benchmarks.gpu.ceilings import measure_ceilings
from benchmarks.gpu.measure import Context, Outcome

TESTS, CEILINGS = "tests", "ceilings"
MODELS = ("onetrans-s", "onetrans-l")
DTYPES = ("bfloat16", "float16")
CANDIDATES = (100, 1, 500, 2000)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One entry.

    Attributes:
        name: In the record and for --only.
        seconds: What it is expected to take on an H200; it does not start with less left.
        run: Measures. None for the tests, which the runner runs itself.
        alone: In a process of its own, which is ended when time is up.
    """

    name: str
    seconds: float
    run: Callable[[Context], Outcome] | None
    alone: bool = False


def measures() -> dict[str, Measure]:
    """All, in order."""
    found: dict[str, Measure] = {}
    for measure in _all():
        found.setdefault(measure.name, measure)
    return found


def _all() -> Iterator[Measure]:
    yield Measure(name=TESTS, seconds=150, run=None)
    yield Measure(name=CEILINGS, seconds=6, run=measure_ceilings)
    yield _of("decode", passes.decode, "onetrans-l", "bfloat16", 30)
    yield _of("candidate_attention", kernels.candidate_attention, "onetrans-l", "bfloat16", 25)
    yield _of("history_attention", kernels.history_attention, "onetrans-l", "bfloat16", 15)
    yield _of("prefill", passes.prefill, "onetrans-s", "bfloat16", 25)
    yield _of("candidate_attention", kernels.candidate_attention, "onetrans-s", "bfloat16", 20)
    yield _of("history_attention", kernels.history_attention, "onetrans-s", "bfloat16", 12)
    yield _of("candidate_flex", kernels.candidate_flex, "onetrans-l", "bfloat16", 40)
    yield _of("candidate_flex", kernels.candidate_flex, "onetrans-s", "bfloat16", 40)
    yield _of("request", passes.request, "onetrans-s", "bfloat16", 15)
    yield _compiled("decode", passes.decode, "onetrans-l", "bfloat16", 70, only=100)
    yield _compiled("prefill", passes.prefill, "onetrans-s", "bfloat16", 100)
    yield _unsplit("onetrans-s", "bfloat16", 240)
    done = {("prefill", "onetrans-s"), ("decode", "onetrans-l"), ("request", "onetrans-s")}
    programs = {"prefill": passes.prefill, "append": passes.append, "decode": passes.decode, "request": passes.request}
    for dtype in DTYPES:
        for model in MODELS:
            for name, run in programs.items():
                if dtype != DTYPES[0] or (name, model) not in done:
                    yield _of(name, run, model, dtype, 20)
    for dtype in DTYPES:
        for model in MODELS:
            yield _of("mixed_linear", kernels.mixed_linear, model, dtype, 15)
            yield _of("mixed_ffn", kernels.mixed_ffn, model, dtype, 10)
    for model in MODELS:
        yield _of("history_attention", kernels.history_attention, model, "float16", 15)
        yield _of("candidate_attention", kernels.candidate_attention, model, "float16", 25)
    yield _unsplit("onetrans-l", "bfloat16", 300)
    for dtype in DTYPES:
        for model in MODELS:
            yield _of("history_flex", kernels.history_flex, model, dtype, 40)
            if dtype != DTYPES[0]:
                yield _of("candidate_flex", kernels.candidate_flex, model, dtype, 40)
    for dtype in DTYPES:
        for model in MODELS:
            for C in CANDIDATES:
                yield _compiled("decode", passes.decode, model, dtype, 70, only=C)
            for name, run in (("prefill", passes.prefill), ("append", passes.append)):
                yield _compiled(name, run, model, dtype, 100)
            yield _of("kernels_compiled", kernels.by_compiler, model, dtype, 90)
    yield _unsplit("onetrans-s", "float16", 240)
    yield _unsplit("onetrans-l", "float16", 300)


def _of(name: str, run: Callable[..., Outcome], model: str, dtype: str, seconds: float) -> Measure:
    return Measure(
        name=f"{name}/{model}/{dtype}", seconds=seconds, run=functools.partial(run, model=model, dtype=dtype)
    )


def _compiled(
    name: str, run: Callable[..., Outcome], model: str, dtype: str, seconds: float, *, only: int | None = None
) -> Measure:
    if only is not None:
        name, run = f"{name}_compiled/{only}", functools.partial(run, only=only)
    else:
        name = f"{name}_compiled"
    return _of(name, functools.partial(run, modes=("reduce-overhead",)), model, dtype, seconds)


def _unsplit(model: str, dtype: str, seconds: float) -> Measure:
    run = functools.partial(passes.request, model=model, dtype=dtype, mode="max-autotune")
    return Measure(name=f"request_unsplit/{model}/{dtype}", seconds=seconds, run=run, alone=True)
