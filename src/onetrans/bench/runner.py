"""The runner: measures in order until time is up, each kept as soon as it is done and not repeated.

A measure stands while its key does, which the caller makes. What is no part of it, as the table of tuned launch
configurations, is a fact that an entry notes, so that tuning voids nothing.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onetrans.bench.environment import environment, gpu_state
from onetrans.bench.processes import run_within
from onetrans.bench.rates import Rates
from onetrans.bench.record import command, write_json
from onetrans.bench.suite import Outcome, format_row, new_suite, read_suite
from onetrans.errors import ConfigError, JobError

GRACE = 20.0  # seconds beyond the budget after which a measure in a process of its own is ended
RECOMPILES = 64
BEGUN = "begun"  # in the record while a measure runs: its name
Key = dict[str, Any]


class LostContextError(JobError):
    """The device's context is lost: nothing more can run in this process."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measure.

    Attributes:
        name: In the record and for --only.
        seconds: What it is expected to take; it does not start with less left.
        run: Measures.
        concerns: Ops that it runs by our kernels, and `programs`: a failing test of one leaves no figures.
        dtype: Its dtype, for the same purpose.
        alone: In a process of its own, which is ended when time is up.
    """

    name: str
    seconds: float
    run: Callable[[Any], Outcome]
    concerns: tuple[str, ...] = ()
    dtype: str = ""
    alone: bool = False

    @property
    def module(self) -> str:
        """Where its code is."""
        function: Any = self.run
        while isinstance(function, functools.partial):
            function = function.func
        return str(function.__module__)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Measures that share a record.

    Attributes:
        needs: Measures that come before any other; the first may list failing tests in its entry's `concerns`.
        budget: Seconds.
        gpu: Whether torch runs it on a GPU, whose state is noted.
        facts: Gives further fields of every entry; a held measure stands though they differ.
    """

    name: str
    measures: dict[str, Measure]
    needs: tuple[str, ...] = ()
    budget: float = float("inf")
    gpu: bool = False
    facts: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of one run; see `python -m benchmarks --help`.

    Attributes:
        output: Folder of record and log.
        root: The checkout, where processes run.
        log: Whether to write a log.
    """

    output: Path
    root: Path = Path()
    log: bool = False
    only: tuple[str, ...] = ()
    fresh: bool = False
    quick: bool = False
    budget: float | None = None
    threads: int = 2
    rehearse: bool = False
    commit: str | None = None
    alone: Path | None = None


def chosen(only: Sequence[str], known: Mapping[str, Measure]) -> list[Measure]:
    """The measures that a pattern names, in order; a pattern without wildcards also stands for what begins with it.

    Raises:
        ConfigError: None is of that name.
    """
    found = []
    for name, measure in known.items():
        if not only or any(fnmatch.fnmatchcase(name, p) or name.startswith(f"{p}/") for p in only):
            found.append(measure)
    if not found:
        raise ConfigError(f"no measure is called {', '.join(only)}; --list names them")
    return found


class Runner:
    """One run of a suite; sets `progress`, `left` and `rates` of the context, and empties its `programs`."""

    def __init__(
        self,
        suite: Suite,
        options: Options,
        context: Any,
        key_of: Callable[[Measure], Key],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.suite, self.options, self.context, self.clock = suite, options, context, clock
        self.began, self.gpu = clock(), suite.gpu
        self.budget = options.budget or suite.budget
        if self.gpu:
            _prepare_torch()
        self.path = options.output / f"{suite.name}.json"
        self.keys = {name: key_of(measure) for name, measure in suite.measures.items()}
        self.record = read_suite(self.path) if self.path.exists() else new_suite(suite.name)
        self.failed: list[str] = []
        context.progress, context.left = lambda line: self.say(f"  {line}"), self.left

    def say(self, line: str) -> None:
        """Tells the reader, with the seconds since the start; where `--output` is given, its log too."""
        text = f"{self.clock() - self.began:6.1f} s  {line}"
        print(text, file=sys.stderr, flush=True)
        if self.options.log and not self.options.rehearse:
            self.options.output.mkdir(parents=True, exist_ok=True)
            with (self.options.output / f"{self.suite.name}.log").open("a", encoding="utf-8") as log:
                log.write(text + "\n")

    def left(self) -> float:
        """Seconds of the budget."""
        return self.budget - (self.clock() - self.began)

    def stands(self, name: str) -> bool:
        """Whether the record's entry is of this key, and did not fail; or is of tests that ran and told what failed."""
        entry = self.record["measures"].get(name)
        if entry is None or entry["key"] != self.keys[name]:
            return False
        return not entry.get("failed") or any(part for part, _, _ in entry.get("concerns", []))

    def run(self) -> int:
        """Runs what is to be run; gives the exit status."""
        options, known = self.options, self.suite.measures
        wanted = chosen(options.only, known)
        for name in self.suite.needs:
            if self.stands(name) and "rates" in self.record["measures"][name]:
                self.context.rates = Rates(**self.record["measures"][name]["rates"])
        if options.alone is not None:
            write_json(options.alone, self.measure(wanted[0]))
            return 0
        needed = [known[name] for name in (self.suite.needs[1:] if options.rehearse else self.suite.needs)]
        wanted = list({m.name: m for m in (*needed, *wanted)}.values())
        if not options.rehearse:
            self.name_the_ended()
        todo = [m for m in wanted if options.fresh or options.rehearse or not self.stands(m.name)]
        todo.sort(key=self.failed_before)  # stable
        if len(wanted) > len(todo):
            self.say(f"{len(wanted) - len(todo)} of {len(wanted)} measures are held already (--fresh measures again)")
            self.name_other_facts(wanted, todo)
        waiting = self.go_through(todo)
        if waiting:
            names = ", ".join(measure.name for measure in waiting[:6]) + (", …" if len(waiting) > 6 else "")
            self.say(f"time is up: {len(waiting)} measures wait for another run: {names}")
        if not options.rehearse:
            self.say(f"record: {self.path}")
        for name in self.failed:
            self.say(f"failed: {name}")
        return 1 if self.failed else 0

    def failed_before(self, measure: Measure) -> bool:
        """Whether it failed in an earlier run: then it comes after what was never tried."""
        entry = self.record["measures"].get(measure.name, {})
        return measure.name not in self.suite.needs and bool(entry.get("failed"))

    def name_other_facts(self, wanted: Sequence[Measure], todo: Sequence[Measure]) -> None:
        """Says how many held measures differ in a fact, such as the table of tuned configurations that they used."""
        held = [self.record["measures"][name] for name in {m.name for m in wanted} - {m.name for m in todo}]
        for fact, value in self.suite.facts().items():
            other = sum(entry.get(fact, value) != value for entry in held)
            if other:
                self.say(f"{other} of them have another {fact}, which their entries note")

    def name_the_ended(self) -> None:
        """Notes that a measure failed in which an earlier run was ended, so that it does not end this one as early."""
        measure = self.suite.measures.get(self.record.pop(BEGUN, ""))
        if measure is not None and measure.name not in self.suite.needs:
            self.keep(measure.name, self.entry(measure, Outcome(failed="the run was ended while it ran")))

    def go_through(self, todo: Sequence[Measure]) -> list[Measure]:
        """Measures while there is time; gives what did not fit."""
        waiting, started = [], False
        for measure in todo:
            if self.left() <= 0 or (started and measure.seconds > self.left()):
                waiting.append(measure)
                continue
            started = True
            self.say(f"{measure.name}:")
            test = self.failing_test(measure)
            if test:
                entry = self.entry(measure, Outcome(failed=f"not timed, since a GPU test failed: {test}"))
            else:
                if not self.options.rehearse:
                    self.record[BEGUN] = measure.name
                    write_json(self.path, self.record)
                entry = self.measure(measure)
            if entry.get("failed"):
                self.failed.append(f"{measure.name}: {entry['failed']}")
            if not self.options.rehearse:
                self.keep(measure.name, entry)
            if entry.get("lost"):
                raise JobError(entry["failed"])
        return waiting

    def failing_test(self, measure: Measure) -> str:
        """The failing GPU test of what a measure runs; empty where there is none."""
        tests = self.suite.needs[0] if self.suite.needs else ""
        entry = self.record["measures"].get(tests, {})
        if self.options.rehearse or not measure.concerns or entry.get("key") != self.keys.get(tests):
            return ""
        for parts, dtype, test in entry.get("concerns", []):
            if dtype in ("", measure.dtype) and (not parts or set(parts.split()) & set(measure.concerns)):
                return str(test)
        return ""

    def measure(self, measure: Measure) -> dict[str, Any]:
        """One measure's entry for the record."""
        began, where = self.clock(), self.surroundings()
        if measure.alone and not self.options.rehearse and self.options.alone is None:
            return self.in_process(measure)
        outcome = Outcome()
        try:
            with _no_gradients(self.gpu):
                outcome = measure.run(self.context)
        except LostContextError as error:
            outcome.failed, outcome.facts["lost"] = str(error), True
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            lines = str(error).strip().splitlines() or ["no message"]
            outcome.failed = f"{type(error).__name__}: {lines[0][:200]}"
            if self.gpu:
                from onetrans.bench.competition import check_alive

                try:
                    check_alive(error)
                except LostContextError as gone:
                    outcome.failed, outcome.facts["lost"] = str(gone), True
        if self.gpu and not outcome.facts.get("lost"):
            import torch

            from onetrans.bench.timing import clear

            torch.compiler.reset()
            clear()
            outcome.facts["gpu_after"] = gpu_state()
        return self.entry(measure, outcome, where, self.clock() - began)

    def surroundings(self) -> dict[str, Any]:
        """Machine, libraries, source, and the GPU's state now."""
        found = environment()
        found["commit"] = found["commit"] or self.options.commit
        return {**found, "gpu": gpu_state()} if self.gpu else found

    def entry(
        self, measure: Measure, outcome: Outcome, where: dict[str, Any] | None = None, seconds: float = 0.0
    ) -> dict[str, Any]:
        """An outcome as the record keeps it; told to the reader."""
        if self.options.rehearse:
            outcome.rows = [replace(row, target=None) for row in outcome.rows]
        made: dict[str, Any] = {
            "key": self.keys[measure.name],
            "environment": where or self.surroundings(),
            "command": command(),
        }
        made |= {"seconds": round(seconds, 1), **outcome.plain(), **self.suite.facts()}
        if outcome.failed:
            self.say(f"  FAILED: {outcome.failed}")
        for row in made["rows"]:
            self.say("  " + format_row(row))
        for note in made["notes"]:
            self.say(f"  ({note})")
        return made

    def keep(self, name: str, entry: dict[str, Any]) -> None:
        """Puts an entry into the record, which is written at once."""
        held = self.record["measures"]
        held[name] = entry
        self.record.pop(BEGUN, None)
        self.record["measures"] = {n: held[n] for n in self.suite.measures if n in held}
        write_json(self.path, self.record)

    def in_process(self, measure: Measure) -> dict[str, Any]:
        """A measure in a process of its own, ended when time is up."""
        limit = max(self.left() + GRACE, GRACE)
        self.context.programs.clear()
        with tempfile.TemporaryDirectory(prefix="onetrans-alone-") as folder:
            made, printed = Path(folder) / "entry.json", Path(folder) / "printed"
            arguments = ["--suite", self.suite.name, "--only", measure.name, "--alone", str(made)]
            arguments += ["--output", str(self.options.output), *(["--quick"] if self.options.quick else [])]
            arguments += ["--commit", self.options.commit] if self.options.commit else []
            status = run_within([sys.executable, "-m", "benchmarks", *arguments], limit, printed, self.options.root)
            lines = printed.read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(lines[-30:]), file=sys.stderr)
            if made.exists():
                found: dict[str, Any] = json.loads(made.read_text(encoding="utf-8"))
                return found
        failed = f"ended after {limit:.0f} s" if status is None else f"its process gave {status}"
        return self.entry(measure, Outcome(failed=failed))


def _prepare_torch() -> None:
    import torch

    from onetrans.bench.timing import set_aside

    config: Any = torch._dynamo.config
    for name, value in {"recompile_limit": RECOMPILES, "fail_on_recompile_limit_hit": True}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    set_aside()


def _no_gradients(gpu: bool) -> contextlib.AbstractContextManager[Any]:
    if not gpu:
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()
