"""Tuning: `python -m benchmarks --suite gpu --tune` times every launch configuration, and keeps what beats the default.

A configuration serves every number of rows (results may not depend on it), so it is judged by the geometric mean of its
times over the default's in several cases. What is done stands in a record beside the suite's and is not repeated.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases.kernels import calls_of, cases_of, distinct
from benchmarks.contestants.kernels import CANDIDATES, FFN, HISTORY, LINEAR, OPS, Case, draw, launch, reference
from benchmarks.context import ROOT, Context, Sizes
from benchmarks.suites import DTYPES, MODELS
from onetrans.bench.competition import check_alive, compare, reason
from onetrans.bench.environment import environment, gpu_state, libraries
from onetrans.bench.record import files_hash, write_json
from onetrans.bench.runner import Options
from onetrans.bench.suite import new_suite, read_suite
from onetrans.bench.timing import Run, clear, times_faster
from onetrans.errors import JobError
from onetrans.files import replace_text
from onetrans.kernels.launch import LaunchConfig, Problem
from onetrans.kernels.launch import table as launch_table
from onetrans.kernels.launch.device import device_of
from onetrans.precision import precision

WINS = 1.03  # times faster than the default that a configuration must be
FINALISTS = 3
REHEARSED = 2  # configurations and problems of each op in a rehearsal
WORKERS = 8
PROBLEM_SECONDS = 45.0  # what one problem is expected to take
BUDGET = 450.0
assert OPS[-1] == FFN, "its two launches are mixed_linear's, so it is tuned last"


@contextlib.contextmanager
def use_table(options: Options, *, write: bool) -> Iterator[Path]:
    """Makes the tuned table of `--output` the one in force, here and in processes; where it is tuned, it begins there.

    Without `--output`, and where that folder has no table and gets none, it is the committed one.
    """
    path = options.output / "tuned.json"
    if options.rehearse or not options.log or not (write or path.exists()):
        yield launch_table.table_path()
        return
    if not path.exists():
        replace_text(path, launch_table.table_path().read_text(encoding="utf-8"))
    before = os.environ.get(launch_table.TABLE_VARIABLE)
    os.environ[launch_table.TABLE_VARIABLE] = str(path.resolve())
    _forget()
    try:
        yield path
    finally:
        del os.environ[launch_table.TABLE_VARIABLE]
        if before is not None:
            os.environ[launch_table.TABLE_VARIABLE] = before
        _forget()


def _forget() -> None:
    launch_table.tuned.cache_clear()
    launch_table.choose.cache_clear()


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
    found: dict[str, Task] = {}
    for dtype in DTYPES:
        for op in OPS:
            for model in MODELS:
                for problem, cases in _problems(op, dtype, sizes_of(model)):
                    task = Task(problem=problem, cases=tuple(cases))
                    found.setdefault(task.name, task)
    return sorted(found.values(), key=lambda task: task.problem.op == LINEAR and " to " in task.cases[0].name)


def _problems(op: str, dtype: str, sizes: Sizes) -> Iterator[tuple[Problem, list[Case]]]:
    make, cases = functools.partial(launch_table.problem, op, dtype), cases_of(op, sizes)
    heads = {"E": sizes.config.head_dim, "H": sizes.config.heads}
    if op == HISTORY:
        yield make(sizes.history, **heads), _some(cases, 5)
    elif op == CANDIDATES:
        first = [case for case in cases if "layer 0:" in case.name and case.rows <= 500]
        yield make(1, **heads, P=sizes.config.l_ns), first
    else:
        groups: dict[tuple[int, int, int], list[Case]] = {}
        for case in distinct([*cases, *_products(sizes)]) if op == LINEAR else cases:
            groups.setdefault((case.P, case.D, case.F), []).append(case)
        for (P, D, F), group in groups.items():
            yield make(group[0].rows, D=D, F=F, P=P, gated=0), _some([c for c in group if c.rows <= 1500], 4)


def _products(sizes: Sizes) -> Iterator[Case]:
    """Those of feed-forwards in two launches, of tokenizers and heads."""
    config, schema = sizes.config, sizes.config.schema
    d, wide = config.d, config.tokenizer_hidden
    for case in cases_of(FFN, sizes):
        shared = {"op": LINEAR, "P": case.P, "rows": case.rows}
        yield Case(name=f"{case.name}: up", D=d, F=case.F, gain=True, **shared)  # type: ignore[arg-type]
        yield Case(name=f"{case.name}: down", D=case.F, F=d, residual=True, **shared)  # type: ignore[arg-type]
    event, candidate = (sum(f.embedded_dim for f in part) for part in (schema.event, schema.candidate))
    pairs = [(event, config.event_hidden), (config.event_hidden, d)]
    heads = [(candidate, wide), (wide, config.l_ns * d), (d, config.head_hidden), (config.head_hidden, 1)]
    for rows in (sizes.history, sizes.new):
        for D, F in pairs:
            yield Case(op=LINEAR, name=f"events, {rows} rows: {D} to {F}", rows=rows, D=D, F=F)
    for C in sizes.candidates:
        for D, F in heads:
            yield Case(op=LINEAR, name=f"C = {C}: {D} to {F}", rows=C, D=D, F=F)


def _some(cases: Sequence[Case], most: int) -> list[Case]:
    """At most so many, evenly over the list, its ends among them."""
    if len(cases) <= most:
        return list(cases)
    return [cases[round(i * (len(cases) - 1) / (most - 1))] for i in range(most)]


def warm(cases: Sequence[Case], dtype: str, config: LaunchConfig) -> str | None:
    """Compiles a configuration into Triton's cache and runs every case once, in a worker; says what went wrong."""
    try:
        for case in cases:
            with launch_table.forced(case.op, config):
                launch(case, draw(case, 0, "cuda", precision(dtype).torch))
        torch.cuda.synchronize()
    except Exception as error:
        return reason(error)
    return None


class Tuner:
    """One run of tuning."""

    def __init__(self, options: Options) -> None:
        self.options, self.began = options, time.monotonic()
        device = "cpu" if options.rehearse else "cuda"
        self.context = Context(work=Path(), device=device, rehearse=options.rehearse, progress=self.say)
        self.device = device_of(torch.device(device))
        self.path = options.output / "gpu-tuning.json"
        self.record = read_suite(self.path) if self.path.exists() else new_suite("gpu-tuning")
        source = files_hash(ROOT, (ROOT / "src" / "onetrans" / "kernels").rglob("*.py"))
        self.key = {"source_sha256": source, "device": gpu_state().get("name"), "libraries": libraries()}

    def say(self, line: str) -> None:
        """Tells the reader."""
        print(f"{time.monotonic() - self.began:6.1f} s  {line}", file=sys.stderr, flush=True)

    def run(self) -> int:
        """Tunes until time is up."""
        held, options = self.record["measures"], self.options
        todo = [t for t in tasks(self.context.sizes) if options.fresh or held.get(t.name, {}).get("key") != self.key]
        todo = [t for t in todo if not options.only or t.problem.op in options.only]
        if options.rehearse:
            todo = [t for op in OPS for t in [t for t in todo if t.problem.op == op][:REHEARSED]]
        with torch.no_grad(), self.workers() as pool:
            for index, task in enumerate(todo):
                left = (options.budget or BUDGET) - (time.monotonic() - self.began)
                if left <= 0 or (index and left < PROBLEM_SECONDS):
                    self.say(f"time is up: {len(todo) - index} problems wait for another run")
                    break
                self.keep(task, self.tune(task, pool))
        return 0

    @contextlib.contextmanager
    def workers(self) -> Iterator[concurrent.futures.Executor | None]:
        """Processes that compile side by side; none in a rehearsal."""
        if self.options.rehearse:
            yield None
            return
        count, spawn = max(1, min(WORKERS, len(os.sched_getaffinity(0)) // 2)), multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(count, mp_context=spawn) as pool:
            yield pool

    def tune(self, task: Task, pool: concurrent.futures.Executor | None) -> dict[str, Any]:
        """Finds the best configuration of a problem; an entry for the record."""
        problem, excluded = task.problem, dict[str, str]()
        module = importlib.import_module(f"onetrans.kernels.{problem.op}.configs")
        default = module.default(problem, self.device)
        space = list(dict.fromkeys([default, *module.space(problem, self.device)]))
        space = space[:REHEARSED] if self.options.rehearse else space
        self.say(f"{task.name}: {len(space)} configurations in {len(task.cases)} cases")
        if pool is not None:
            jobs = {config: pool.submit(warm, task.cases, problem.dtype, config) for config in space}
            failures = {config: job.result() for config, job in jobs.items()}
            excluded = {str(config): failure for config, failure in failures.items() if failure}
            space = [config for config in space if not failures[config]]
        if default not in space:
            raise JobError(f"{task.name}: the default configuration cannot run: {excluded.get(str(default))}")
        quick = self.times(task, space, excluded, whole=False)
        score = {
            config: _mean(a / b for a, b in zip(times, quick[default], strict=True)) for config, times in quick.items()
        }
        finalists = sorted(score, key=lambda config: score[config])[:FINALISTS]
        full = self.times(task, list(dict.fromkeys([default, *finalists])), excluded, whole=True)
        best, gain, sure = default, 1.0, 1.0
        for config, blocks in full.items():
            estimates = [times_faster(mine, theirs) for mine, theirs in zip(blocks, full[default], strict=True)]
            mean, low = _mean(e.value for e in estimates), _mean(e.low for e in estimates)
            if mean > gain:
                best, gain, sure = config, mean, low
        won = best != default and gain >= WINS and sure > 1.0
        self.say(f"{task.name}: {gain:.3f} times faster than the default{'' if won else ', kept as it is'}: {best}")
        clear()
        found = {"default": dataclasses.asdict(default), "excluded": excluded, "tried": len(space)}
        return {**found, "best": dataclasses.asdict(best), "times_faster": gain, "at_least": sure, "won": won}

    def times(
        self, task: Task, space: Sequence[LaunchConfig], excluded: dict[str, str], *, whole: bool
    ) -> dict[Any, Any]:
        """Per configuration and case: blocks of seconds, in turn, or the shortest of one block."""
        found: dict[LaunchConfig, list[Any]] = {config: [] for config in space}
        for case in task.cases:
            runs = self.runs(task, case, list(found), excluded)
            found = {config: times for config, times in found.items() if config in runs}
            blocks = self.context.timer.blocks(runs) if whole else self.context.timer.blocks(runs, count=1)
            for config, samples in blocks.items():
                found[config].append(samples if whole else min(min(block) for block in samples))
            del runs
            clear()
        return found

    def runs(self, task: Task, case: Case, space: Sequence[LaunchConfig], excluded: dict[str, str]) -> dict[Any, Run]:
        """A graph for each configuration that gives what the reference gives."""
        dtype, calls = precision(task.problem.dtype).torch, calls_of(self.context, case.work)
        inputs = [draw(case, index, self.context.device, dtype) for index in range(calls)]
        double, plain = reference(case, inputs[0], double=True), reference(case, inputs[0])
        found = {}
        for config in space:
            try:
                with launch_table.forced(case.op, config):
                    out = launch(case, inputs[0], inputs[0].empty().fill_(float("nan")))
                    parity = compare(out, plain, double, rounding=inputs[0].rounding)
                    if parity.passed:
                        goes = [functools.partial(launch, case, each) for each in inputs]
                        found[config] = self.context.timer.graph(goes)
                    else:
                        excluded[str(config)] = f"{case.name}: {parity}"
            except Exception as error:
                check_alive(error)
                excluded[str(config)] = f"{case.name}: {reason(error)}"
        return found

    def keep(self, task: Task, entry: dict[str, Any]) -> None:
        """Puts a problem's outcome into the record, and a winner into the tuned table in force."""
        if self.options.rehearse:
            return
        where = {**environment(), "gpu": gpu_state()}
        where["commit"] = where["commit"] or self.options.commit
        cases = [case.name for case in task.cases]
        self.record["measures"][task.name] = {"key": self.key, "environment": where, "cases": cases, **entry}
        write_json(self.path, self.record)
        problem, path = task.problem, launch_table.table_path()
        tuned = json.loads(path.read_text(encoding="utf-8"))
        here = tuned.setdefault(self.device.name, {"capability": self.device.capability, "ops": {}})
        keys = here["ops"].setdefault(problem.op, {}).setdefault(problem.dtype, {})
        keys.pop(problem.key, None)
        if entry["won"]:
            keys[problem.key] = entry["best"]
        write_json(path, tuned)
        _forget()


def _mean(values: Any) -> float:
    """The geometric mean."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))
