"""Tuning: `python -m benchmarks.gpu --tune` times every launch configuration, and keeps those that beat the default.

A configuration serves every number of rows (results may not depend on it), so it is judged by the geometric mean of its
times over the default's in several cases. What is done stands in a record beside the suite's and is not repeated.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu import ways
from benchmarks.gpu.cases import (
    CandidateCase,
    Case,
    FfnCase,
    HistoryCase,
    LinearCase,
    calls_of,
    candidate_cases,
    distinct,
    draw,
    ffn_cases,
    history_cases,
    linear_cases,
)
from benchmarks.gpu.catalogue import DTYPES, MODELS
from benchmarks.gpu.device import SOURCE, check_device, device_name, digest, key, surroundings
from benchmarks.gpu.measure import Context, Sizes, lost_context, reason
from benchmarks.gpu.parity import compare
from benchmarks.gpu.run import Options
from benchmarks.gpu.timing import CudaTimer, HostTimer, Run, clear, times_faster
from benchmarks.suite import new_suite, read_suite
from onetrans.bench.record import write_json
from onetrans.errors import JobError
from onetrans.kernels.candidate_attention import configs as candidate_configs
from onetrans.kernels.history_attention import configs as history_configs
from onetrans.kernels.launch import Device, LaunchConfig, Problem
from onetrans.kernels.launch import table as launch_table
from onetrans.kernels.launch.device import device_of
from onetrans.kernels.mixed_ffn import configs as ffn_configs
from onetrans.kernels.mixed_linear import configs as linear_configs

WINS = 1.03  # times faster than the default that a configuration must be
FINALISTS = 3
REHEARSED = 2  # configurations and problems of each op in a rehearsal
WORKERS = 8
PROBLEM_SECONDS = 45.0  # what one problem is expected to take
CONFIGS: dict[str, Any] = {
    "mixed_linear": linear_configs,
    "history_attention": history_configs,
    "candidate_attention": candidate_configs,
    "mixed_ffn": ffn_configs,  # last: its two launches are mixed_linear's
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One problem of the tuned table, and the cases that stand for it."""

    problem: Problem
    cases: tuple[Case, ...]

    @property
    def name(self) -> str:
        """In the record."""
        return f"{self.problem.op}/{self.problem.dtype}/{self.problem.key}"


def tasks(sizes_of: Callable[[str], Sizes]) -> list[Task]:
    """The problems of S and L in both dtypes; last the products of tokenizers and heads."""
    found: dict[tuple[str, str], Task] = {}
    for dtype in DTYPES:
        for op in CONFIGS:
            for model in MODELS:
                for what, cases in _problems(op, dtype, sizes_of(model)):
                    found.setdefault((what.dtype, f"{op} {what.key}"), Task(problem=what, cases=tuple(cases)))
    return sorted(found.values(), key=lambda task: task.problem.op == "mixed_linear" and " to " in task.cases[0].name)


def _problems(op: str, dtype: str, sizes: Sizes) -> Iterator[tuple[Problem, list[Case]]]:
    config = sizes.config
    make = functools.partial(launch_table.problem, op, dtype)
    heads = {"E": config.head_dim, "H": config.heads}
    if op == "history_attention":
        yield make(sizes.history, **heads), _some(history_cases(sizes), 5)
    elif op == "candidate_attention":
        first = [case for case in candidate_cases(sizes) if "layer 0:" in case.name and case.candidates <= 500]
        yield make(1, **heads, P=config.l_ns), list(first)
    else:
        groups: dict[tuple[int, int, int], list[Case]] = {}
        for case in _products(sizes) if op == "mixed_linear" else ffn_cases(sizes):
            columns = case.columns if isinstance(case, LinearCase) else case.hidden
            groups.setdefault((case.positions, case.inner, columns), []).append(case)
        for (P, D, F), cases in groups.items():
            yield make(cases[0].rows, D=D, F=F, P=P, gated=0), _some([c for c in cases if c.rows <= 1500], 4)


def _products(sizes: Sizes) -> list[LinearCase]:
    """Those of blocks, of feed-forwards in two launches, of tokenizers and heads."""
    config = sizes.config
    d, hidden = config.d, config.ffn_ratio * config.d
    found = list(linear_cases(sizes))
    for case in ffn_cases(sizes):
        shared = {"positions": case.positions, "rows": case.rows}
        found.append(LinearCase(name=f"{case.name}: up", inner=d, columns=hidden, gain=True, **shared))
        found.append(LinearCase(name=f"{case.name}: down", inner=hidden, columns=d, residual=True, **shared))
    schema, wide = config.schema, config.tokenizer_hidden
    event, candidate = (sum(f.embedded_dim for f in part) for part in (schema.event, schema.candidate))
    for rows in (sizes.history, sizes.new):
        for inner, columns in ((event, config.event_hidden), (config.event_hidden, d)):
            name = f"events, {rows} rows: {inner} to {columns}"
            found.append(LinearCase(name=name, positions=1, rows=rows, inner=inner, columns=columns))
    for C in sizes.candidates:
        for inner, columns in (
            (candidate, wide),
            (wide, config.l_ns * d),
            (d, config.head_hidden),
            (config.head_hidden, 1),
        ):
            name = f"C = {C}: {inner} to {columns}"
            found.append(LinearCase(name=name, positions=1, rows=C, inner=inner, columns=columns))
    return distinct(found)


def _some(cases: Sequence[Case], most: int) -> list[Case]:
    """At most so many, evenly over the list, its ends among them."""
    if len(cases) <= most:
        return list(cases)
    return [cases[round(i * (len(cases) - 1) / (most - 1))] for i in range(most)]


@contextlib.contextmanager
def forced(case: Case, config: LaunchConfig) -> Iterator[LaunchConfig | None]:
    """The configuration in force for attention; products take it as an argument, which is given."""
    if isinstance(case, HistoryCase | CandidateCase):
        op = "history_attention" if isinstance(case, HistoryCase) else "candidate_attention"
        with launch_table.forced(op, config):
            yield None
    else:
        assert isinstance(case, LinearCase | FfnCase)
        yield config


def warm(cases: Sequence[Case], dtype: str, config: LaunchConfig) -> str | None:
    """Compiles a configuration into Triton's cache and runs every case once, in a worker; says what went wrong."""
    try:
        for case in cases:
            inputs = draw(case, 0, torch.device("cuda"), getattr(torch, dtype))
            with forced(case, config) as given:
                ways.launch_ours(case, inputs, ways.empty_result(case, inputs), given)
        torch.cuda.synchronize()
    except Exception as error:
        return reason(error)
    return None


class Tuner:
    """One run of tuning."""

    def __init__(self, options: Options) -> None:
        self.options, self.began = options, time.monotonic()
        rehearse = options.rehearse
        self.context = Context(
            timer=HostTimer() if rehearse else CudaTimer(),
            device=torch.device("cpu" if rehearse else "cuda"),
            rehearse=rehearse,
            progress=lambda line: print(f"{time.monotonic() - self.began:6.1f} s  {line}", file=sys.stderr, flush=True),
        )
        self.device: Device = device_of(self.context.device)
        self.path = options.output.with_name(f"{options.output.stem}-tuning.json")
        self.record = read_suite(self.path) if self.path.exists() else new_suite("gpu-tuning")
        kernels = (path for path in (SOURCE / "kernels").rglob("*.py"))
        self.key = {**key(look=False), "source_sha256": digest(kernels)}

    def run(self) -> int:
        """Tunes until time is up."""
        todo = [
            task
            for task in tasks(self.context.sizes)
            if self.options.fresh or self.record["measures"].get(task.name, {}).get("key") != self.key
        ]
        todo = [t for t in todo if not self.options.only or t.problem.op in self.options.only]
        if self.options.rehearse:
            todo = [t for op in CONFIGS for t in [t for t in todo if t.problem.op == op][:REHEARSED]]
        with self.workers() as pool:
            for index, task in enumerate(todo):
                left = self.options.budget - (time.monotonic() - self.began)
                if left <= 0 or (index and left < PROBLEM_SECONDS):
                    self.context.progress(f"time is up: {len(todo) - index} problems wait for another run")
                    break
                self.keep(task, self.tune(task, pool))
        return 0

    @contextlib.contextmanager
    def workers(self) -> Iterator[concurrent.futures.Executor | None]:
        """Processes that compile side by side; none in a rehearsal."""
        if self.options.rehearse:
            yield None
            return
        count = max(1, min(WORKERS, len(os.sched_getaffinity(0)) // 2))
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(count, mp_context=spawn) as pool:
            yield pool

    def tune(self, task: Task, pool: concurrent.futures.Executor | None) -> dict[str, Any]:
        """Finds the best configuration of a problem; an entry for the record."""
        what, dtype = task.problem, task.problem.dtype
        module = CONFIGS[what.op]
        default = module.default(what, self.device)
        space = list(dict.fromkeys([default, *module.space(what, self.device)]))
        if self.options.rehearse:
            space = space[:REHEARSED]
        self.context.progress(f"{task.name}: {len(space)} configurations in {len(task.cases)} cases")
        excluded: dict[str, str] = {}
        if pool is not None:
            jobs = {config: pool.submit(warm, task.cases, dtype, config) for config in space}
            failures = {config: job.result() for config, job in jobs.items()}
            excluded = {str(config): failure for config, failure in failures.items() if failure}
            space = [config for config in space if not failures[config]]
        if default not in space:
            raise JobError(f"{task.name}: the default configuration cannot run: {excluded.get(str(default))}")
        quick = self.times(task, space, excluded, whole=False)
        score = {config: _mean_ratio(times, quick[default]) for config, times in quick.items()}
        finalists = sorted(score, key=lambda config: score[config])[:FINALISTS]
        full = self.times(task, list(dict.fromkeys([default, *finalists])), excluded, whole=True)
        found: dict[str, Any] = {"default": dataclasses.asdict(default), "excluded": excluded, "tried": len(space)}
        best, gain, sure = default, 1.0, 1.0
        for config, blocks in full.items():
            estimates = [times_faster(mine, theirs) for mine, theirs in zip(blocks, full[default], strict=True)]
            mean = math.exp(sum(math.log(e.value) for e in estimates) / len(estimates))
            low = math.exp(sum(math.log(e.low) for e in estimates) / len(estimates))
            if mean > gain:
                best, gain, sure = config, mean, low
        won = best != default and gain >= WINS and sure > 1.0
        self.context.progress(
            f"{task.name}: {gain:.3f} times faster than the default{'' if won else ', kept as it is'}: {best}"
        )
        found |= {"best": dataclasses.asdict(best), "times_faster": gain, "at_least": sure, "won": won}
        clear()
        return found

    def times(
        self, task: Task, space: Sequence[LaunchConfig], excluded: dict[str, str], *, whole: bool
    ) -> dict[Any, Any]:
        """Per configuration and case: blocks of seconds, in turn, or the shortest of one block."""
        found: dict[LaunchConfig, list[Any]] = {config: [] for config in space}
        for case in task.cases:
            runs = self.runs(task, case, [config for config in space if config in found], excluded)
            for config in [config for config in found if config not in runs]:
                del found[config]
            blocks = self.context.timer.blocks(runs) if whole else self.context.timer.blocks(runs, count=1)
            for config, samples in blocks.items():
                found[config].append(samples if whole else min(min(block) for block in samples))
            del runs
            clear()
        return found

    def runs(self, task: Task, case: Case, space: Sequence[LaunchConfig], excluded: dict[str, str]) -> dict[Any, Run]:
        """A graph for each configuration that gives what the reference gives."""
        which = getattr(torch, task.problem.dtype)
        calls = 1 if self.context.rehearse else calls_of(case.work)
        inputs = [draw(case, index, self.context.device, which) for index in range(calls)]
        gold, plain = ways.reference(case, inputs[0], double=True), ways.reference(case, inputs[0])
        rounding = ways.rounding(case, inputs[0])
        found = {}
        for config in space:
            try:
                with forced(case, config) as given:
                    out = ways.empty_result(case, inputs[0]).fill_(float("nan"))
                    parity = compare(ways.launch_ours(case, inputs[0], out, given), plain, gold, rounding=rounding)
                    if not parity.passed:
                        excluded[str(config)] = f"{case.name}: {parity}"
                        continue
                    found[config] = self.context.timer.graph(
                        [functools.partial(_launch, case, each, given) for each in inputs]
                    )
            except Exception as error:
                lost_context(error)
                excluded[str(config)] = f"{case.name}: {reason(error)}"
        return found

    def keep(self, task: Task, entry: dict[str, Any]) -> None:
        """Puts a problem's outcome into the record, and a winner into the tuned table."""
        if self.options.rehearse:
            return
        self.record["measures"][task.name] = {
            "key": self.key,
            "environment": surroundings(self.options.commit),
            "cases": [case.name for case in task.cases],
            **entry,
        }
        write_json(self.path, self.record)
        what = task.problem
        tuned = json.loads(launch_table.TABLE.read_text(encoding="utf-8"))
        here = tuned.setdefault(device_name(), {"capability": self.device.capability, "ops": {}})
        keys = here["ops"].setdefault(what.op, {}).setdefault(what.dtype, {})
        keys.pop(what.key, None)
        if entry["won"]:
            keys[what.key] = entry["best"]
        write_json(launch_table.TABLE, tuned)
        launch_table.tuned.cache_clear()
        launch_table.choose.cache_clear()


def _launch(case: Case, inputs: Any, config: LaunchConfig | None) -> torch.Tensor:
    return ways.launch_ours(case, inputs, ways.empty_result(case, inputs), config)


def _mean_ratio(times: Sequence[float], of: Sequence[float]) -> float:
    """The geometric mean of times over those of the default."""
    return math.exp(sum(math.log(a / b) for a, b in zip(times, of, strict=True)) / len(of))


def tune(options: Options) -> int:
    """Tunes; gives the exit status.

    Raises:
        OneTransError: Something is missing, or the device was lost.
    """
    if not options.rehearse:
        check_device()
    with torch.no_grad():
        return Tuner(options).run()
