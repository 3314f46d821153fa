"""The runner: measures in order until time is up, each kept as soon as it is done and not repeated."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.catalogue import CEILINGS, TESTS, Measure, measures
from benchmarks.gpu.ceilings import read_ceilings
from benchmarks.gpu.device import ROOT, check_device, device_state, key, surroundings, tests_digest
from benchmarks.gpu.measure import Context, LostContextError, Outcome, lost_context, reason
from benchmarks.gpu.parity_run import run_tests, run_within
from benchmarks.gpu.timing import METHOD, CudaTimer, HostTimer, clear, set_aside
from benchmarks.measure import Row
from benchmarks.suite import format_row, format_value, new_suite, read_suite
from onetrans.bench.record import Record, command, write_json
from onetrans.errors import ConfigError, JobError

GRACE = 20.0  # seconds beyond the budget after which a measure in a process of its own is ended
RECOMPILES = 64
BEGUN = "begun"  # in the record while a measure runs: its name


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of one run.

    Attributes:
        only: Patterns of measures' names; all where empty.
        fresh: Measure again what the record holds.
        budget: Seconds after which no measure starts.
        output: The record.
        look: Time although tests failed, into a record that is never shown.
        rehearse: Run the code on a CPU, and keep nothing.
        commit: To note where there is no checkout.
        alone: The run of one measure by the runner itself: its entry goes to this file, and the record is only read.
    """

    only: tuple[str, ...] = ()
    fresh: bool = False
    budget: float = 450.0
    output: Path = ROOT / "benchmarks" / "results" / "gpu.json"
    look: bool = False
    rehearse: bool = False
    commit: str | None = None
    alone: Path | None = None


def chosen(only: Sequence[str], known: Mapping[str, Measure]) -> list[Measure]:
    """The measures that a pattern names, in order; a pattern without wildcards also stands for what begins with it."""
    found = []
    for name, measure in known.items():
        if not only or any(fnmatch.fnmatchcase(name, p) or name.startswith(f"{p}/") for p in only):
            found.append(measure)
    return found


def stands(held: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> bool:
    """Whether an entry of the record is of this device, these versions and this source, and did not fail."""
    return held is not None and held["key"] == wanted and not held.get("failed")


def shortfall(row: Row) -> str:
    """By how much a target is missed."""
    assert row.target is not None
    if not row.target:
        return f"{row.what}: {format_value(row.value, row.unit)} where there should be none"
    return f"{row.what}: target missed by {100 * abs(row.value / row.target - 1):.0f}%"


def pending(record: Record, wanted: Sequence[Measure], keys: Mapping[str, Any], fresh: bool) -> list[Measure]:
    """What is to be measured; what failed before comes after what was never tried."""
    missing = [m for m in wanted if fresh or not stands(record["measures"].get(m.name), keys[m.name])]

    def failed_before(measure: Measure) -> bool:
        held = record["measures"].get(measure.name)
        return measure.name not in (TESTS, CEILINGS) and held is not None and bool(held.get("failed"))

    return sorted(missing, key=failed_before)  # stable


class Runner:
    """One run of the suite."""

    def __init__(self, options: Options, clock: Callable[[], float] = time.monotonic) -> None:
        self.options, self.clock = options, clock
        self.began = clock()
        if not options.rehearse:
            check_device()
        device = torch.device("cpu" if options.rehearse else "cuda")
        timer = HostTimer() if options.rehearse else CudaTimer()
        self.context = Context(
            timer=timer, device=device, rehearse=options.rehearse, progress=lambda line: self.say(f"  {line}")
        )
        config: Any = torch._dynamo.config
        for name, value in {"recompile_limit": RECOMPILES, "fail_on_recompile_limit_hit": True}.items():
            if hasattr(config, name):
                setattr(config, name, value)
        self.known = measures()
        self.key = key(look=options.look)
        self.keys = dict.fromkeys(self.known, self.key) | {
            TESTS: {**self.key, "quick": False, "tests_sha256": tests_digest()}  # they are the same in a --look run
        }
        self.record = read_suite(options.output) if options.output.exists() else new_suite("gpu")
        self.failed: list[str] = []
        set_aside()

    def say(self, line: str) -> None:
        """Tells the reader, with the seconds since the start."""
        print(f"{self.clock() - self.began:6.1f} s  {line}", file=sys.stderr, flush=True)

    def left(self) -> float:
        """Seconds of the budget."""
        return self.options.budget - (self.clock() - self.began)

    def run(self) -> int:
        """Runs what is to be run; gives the exit status."""
        wanted = chosen(self.options.only, self.known)
        if not wanted:
            raise ConfigError(f"no measure is called {', '.join(self.options.only)}; --list names them")
        if self.options.alone is not None:
            return self.run_alone(wanted[0], self.options.alone)
        if not self.options.rehearse:
            wanted = self.with_needed(wanted)
            self.name_the_ended()
        todo = pending(self.record, wanted, self.keys, self.options.fresh or self.options.rehearse)
        if self.options.look and not self.options.fresh:  # they may have failed, and would again
            todo = [m for m in todo if m.name != TESTS or not self.was_tried(m)]
        held = self.record["measures"].get(CEILINGS)
        if stands(held, self.keys[CEILINGS]):
            self.context.ceilings = read_ceilings(held)
        if self.options.rehearse and self.context.ceilings is None:
            self.measure(self.known[CEILINGS])
        if len(wanted) > len(todo):
            self.say(f"{len(wanted) - len(todo)} of {len(wanted)} measures are held already (--fresh measures again)")
        waiting = self.go_through(todo)
        if waiting:
            names = ", ".join(measure.name for measure in waiting[:6]) + (", …" if len(waiting) > 6 else "")
            self.say(f"time is up: {len(waiting)} measures wait for another run: {names}")
        if not self.options.rehearse:
            self.say(f"record: {self.options.output}")
        for name in self.failed:
            self.say(f"failed: {name}")
        return 1 if self.failed else 0

    def with_needed(self, wanted: list[Measure]) -> list[Measure]:
        """Tests and ceilings before all else."""
        return list({m.name: m for m in (self.known[TESTS], self.known[CEILINGS], *wanted)}.values())

    def was_tried(self, measure: Measure) -> bool:
        """Whether the record holds an entry of this device, these versions and this source, failed or not."""
        held = self.record["measures"].get(measure.name)
        return held is not None and held["key"] == self.keys[measure.name]

    def name_the_ended(self) -> None:
        """Notes that a measure failed in which an earlier run was ended, so that it does not end this one as early."""
        measure = self.known.get(self.record.pop(BEGUN, ""))
        if measure is not None and measure.name not in (TESTS, CEILINGS):
            outcome = Outcome(failed="the run was ended while it ran")
            self.say(f"{measure.name}:")
            self.keep(measure.name, self.entry(measure, outcome, surroundings(self.options.commit), 0.0, False))

    def go_through(self, todo: Sequence[Measure]) -> list[Measure]:
        """Measures while there is time; gives what did not fit."""
        waiting = []
        started = False
        for measure in todo:
            if self.left() <= 0 or (started and measure.seconds > self.left()):
                waiting.append(measure)
                continue
            started = True
            self.say(f"{measure.name}:")
            if not self.options.rehearse:
                self.record[BEGUN] = measure.name
                write_json(self.options.output, self.record)
            entry = self.measure(measure)
            if entry.get("failed"):
                self.failed.append(f"{measure.name}: {entry['failed']}")
            if not self.options.rehearse:
                self.keep(measure.name, entry)
            if entry.get("lost"):
                raise JobError(entry["failed"])
            if measure.name == TESTS and entry.get("failed") and not (self.options.look or self.options.rehearse):
                raise JobError(
                    f"the GPU tests failed, so nothing is timed: {entry['failed']}; --look times all the same, into a"
                    " record of its own"
                )
        return waiting

    def measure(self, measure: Measure) -> dict[str, Any]:
        """One measure's entry for the record."""
        began, outcome, lost = self.clock(), Outcome(), False
        where = surroundings(self.options.commit)
        if measure.alone and not self.options.rehearse and self.options.alone is None:
            return self.in_process(measure, where)
        try:
            if measure.run is None:
                outcome = Outcome() if self.options.rehearse else run_tests(self.context, self.left())
            else:
                with torch.no_grad():
                    outcome = measure.run(self.context)
        except LostContextError as error:
            outcome.failed, lost = str(error), True
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            outcome.failed = reason(error)
            try:
                lost_context(error)
            except LostContextError as gone:
                outcome.failed, lost = str(gone), True
        if not lost:
            torch.compiler.reset()
            clear()
        return self.entry(measure, outcome, where, self.clock() - began, lost)

    def entry(
        self, measure: Measure, outcome: Outcome, where: dict[str, Any], seconds: float, lost: bool
    ) -> dict[str, Any]:
        """As the record keeps it."""
        rows = outcome.rows
        if self.options.rehearse:
            rows = [dataclasses.replace(row, target=None) for row in rows]
        made = {
            "key": self.keys[measure.name],
            "environment": where,
            "after": {} if lost else device_state(),
            "command": command(),
            "method": METHOD,
            "seconds": round(seconds, 1),
            "rows": [{**dataclasses.asdict(row), "met": row.met} for row in rows],
            "figures": outcome.figures,
            "notes": [*outcome.notes, *map(shortfall, (row for row in rows if row.met is False))],
            "samples": outcome.samples,
            "records": {},
            "tables": outcome.tables,
        }
        if outcome.failed:
            self.say(f"  FAILED: {outcome.failed}")
            made["failed"] = outcome.failed
        if lost:
            made["lost"] = True
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
        self.record["measures"] = {n: held[n] for n in self.known if n in held}
        write_json(self.options.output, self.record)

    def in_process(self, measure: Measure, where: dict[str, Any]) -> dict[str, Any]:
        """A measure in a process of its own, ended when time is up."""
        began, limit = self.clock(), max(self.left() + GRACE, GRACE)
        self.context.programs.clear()
        clear()
        with tempfile.TemporaryDirectory(prefix="onetrans-alone-") as folder:
            made, printed = Path(folder) / "entry.json", Path(folder) / "printed"
            arguments = ["--only", measure.name, "--alone", str(made), "--output", str(self.options.output)]
            arguments += ["--look"] if self.options.look else []
            arguments += ["--commit", self.options.commit] if self.options.commit else []
            status = run_within([sys.executable, "-m", "benchmarks.gpu", *arguments], limit, printed)
            lines = printed.read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(lines[-30:]), file=sys.stderr)
            if made.exists():
                found: dict[str, Any] = json.loads(made.read_text(encoding="utf-8"))
                return found
        outcome = Outcome(failed=f"ended after {limit:.0f} s" if status is None else f"its process gave {status}")
        return self.entry(measure, outcome, where, self.clock() - began, False)

    def run_alone(self, measure: Measure, into: Path) -> int:
        """What `in_process` starts."""
        held = self.record["measures"].get(CEILINGS)
        if not stands(held, self.keys[CEILINGS]):
            raise JobError("the device's ceilings are not in the record; measure `ceilings` first")
        self.context.ceilings = read_ceilings(held)
        write_json(into, self.measure(measure))
        return 0


def run(options: Options) -> int:
    """Runs the suite.

    Raises:
        OneTransError: Something is missing, tests failed, or the device was lost.
    """
    if options.look and options.output == Options().output:
        raise ConfigError("--look needs --output FILE: what is timed although tests failed is not kept")
    return Runner(options).run()
