"""The runner: measures in order until time is up, each kept as soon as it is done and not repeated.

A measure stands while its key does: the package's source and the measure's own, the device, libraries and options. The
table of tuned launch configurations is no part of it: an entry notes the table's hash, so that tuning voids nothing.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import importlib
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.context import RESULTS, ROOT, Context, LostContextError
from benchmarks.reckoning import Rates
from benchmarks.suites import CEILINGS, TESTS, Measure, Suite
from onetrans.bench.environment import cpu_model, environment, gpu_state, libraries
from onetrans.bench.processes import run_within
from onetrans.bench.record import command, files_hash, write_json
from onetrans.bench.suite import Outcome, format_row, new_suite, read_suite
from onetrans.errors import ConfigError, JobError

GRACE = 20.0  # seconds beyond the budget after which a measure in a process of its own is ended
RECOMPILES = 64
BEGUN = "begun"  # in the record while a measure runs: its name
Key = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of one run; see `python -m benchmarks --help`."""

    only: tuple[str, ...] = ()
    fresh: bool = False
    quick: bool = False
    budget: float | None = None
    threads: int = 2
    work: Path | None = None
    output: Path | None = None
    rehearse: bool = False
    commit: str | None = None
    alone: Path | None = None
    artefacts: Path | None = None

    @property
    def folder(self) -> Path:
        """Where the record goes."""
        return self.output or RESULTS


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


def measure_key(suite: str, measure: Measure, options: Options) -> Key:
    """What must be equal for a held measure to stand."""
    gpu = suite == "gpu"
    source = ROOT / "src" / "onetrans"
    paths = {path for path in source.rglob("*.py") if path.relative_to(source).parts[0] not in ("cli", "sizing")}
    file = importlib.import_module(measure.module).__file__
    assert file is not None
    paths.add(Path(file))
    if measure.name == TESTS:
        paths |= {*(ROOT / "parity_tests").glob("test_triton_*.py"), ROOT / "parity_tests" / "triton_device.py"}
    return {
        "source_sha256": files_hash(ROOT, paths),
        "quick": options.quick,
        "threads": None if gpu else options.threads,
        "device": (gpu_state().get("name") or "rehearsal") if gpu else cpu_model(),
        "libraries": libraries(),
    }


class Runner:
    """One run of a suite."""

    def __init__(
        self,
        suite: Suite,
        options: Options,
        key_of: Callable[[str, Measure, Options], Key] = measure_key,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.suite, self.options, self.clock = suite, options, clock
        self.began, self.gpu = clock(), suite.name == "gpu"
        self.budget = options.budget or suite.budget
        if self.gpu:
            _prepare_torch()
        self.path = options.folder / f"{suite.name}.json"
        self.keys = {name: key_of(suite.name, measure, options) for name, measure in suite.measures.items()}
        self.record = read_suite(self.path) if self.path.exists() else new_suite(suite.name)
        self.failed: list[str] = []
        self.context = Context(
            work=options.work or Path(tempfile.gettempdir()),
            source=next(iter(self.keys.values()))["source_sha256"][:12],
            progress=lambda line: self.say(f"  {line}"),
            threads=options.threads,
            quick=options.quick,
            device="cuda" if self.gpu and not options.rehearse else "cpu",
            rehearse=options.rehearse,
            left=self.left,
            artefacts=options.artefacts,
        )

    def say(self, line: str) -> None:
        """Tells the reader, with the seconds since the start; where `--output` is given, its log too."""
        text = f"{self.clock() - self.began:6.1f} s  {line}"
        print(text, file=sys.stderr, flush=True)
        if self.options.output is not None and not self.options.rehearse:
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
        if self.stands(CEILINGS):
            self.context.rates = Rates(**self.record["measures"][CEILINGS]["rates"])
        if options.alone is not None:
            write_json(options.alone, self.measure(wanted[0]))
            return 0
        needed = [known[name] for name in self.suite.needs if name != TESTS or not options.rehearse]
        wanted = list({m.name: m for m in (*needed, *wanted)}.values())
        if not options.rehearse:
            self.name_the_ended()
        todo = [m for m in wanted if options.fresh or options.rehearse or not self.stands(m.name)]
        todo.sort(key=self.failed_before)  # stable
        if len(wanted) > len(todo):
            self.say(f"{len(wanted) - len(todo)} of {len(wanted)} measures are held already (--fresh measures again)")
            self.name_other_tables(wanted, todo)
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

    def name_other_tables(self, wanted: Sequence[Measure], todo: Sequence[Measure]) -> None:
        """Says which held measures were taken with another table of tuned configurations."""
        held = {m.name for m in wanted} - {m.name for m in todo}
        other = [n for n in held if self.record["measures"][n].get("tuned_sha256", tuned_hash()) != tuned_hash()]
        if other and self.gpu:
            self.say(f"{len(other)} of them used another tuned table (their entries say which)")

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
        entry = self.record["measures"].get(TESTS, {})
        if self.options.rehearse or not measure.concerns or entry.get("key") != self.keys.get(TESTS):
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
            with _no_gradients(self.suite.name):
                outcome = measure.run(self.context)
        except LostContextError as error:
            outcome.failed, outcome.facts["lost"] = str(error), True
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            lines = str(error).strip().splitlines() or ["no message"]
            outcome.failed = f"{type(error).__name__}: {lines[0][:200]}"
            if self.gpu:
                from benchmarks.competition import check_alive

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
        made |= {"seconds": round(seconds, 1), **outcome.plain()}
        if self.suite.name != "cpu":
            made["tuned_sha256"] = tuned_hash()
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
            arguments += ["--output", str(self.options.folder), *(["--quick"] if self.options.quick else [])]
            arguments += ["--commit", self.options.commit] if self.options.commit else []
            status = run_within([sys.executable, "-m", "benchmarks", *arguments], limit, printed, ROOT)
            lines = printed.read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(lines[-30:]), file=sys.stderr)
            if made.exists():
                found: dict[str, Any] = json.loads(made.read_text(encoding="utf-8"))
                return found
        failed = f"ended after {limit:.0f} s" if status is None else f"its process gave {status}"
        return self.entry(measure, Outcome(failed=failed))


def tuned_hash() -> str:
    """SHA-256 of the table of tuned launch configurations in force."""
    from onetrans.kernels.launch import table

    return hashlib.sha256(table.table_path().read_bytes()).hexdigest()


def _prepare_torch() -> None:
    import torch

    from onetrans.bench.timing import set_aside

    config: Any = torch._dynamo.config
    for name, value in {"recompile_limit": RECOMPILES, "fail_on_recompile_limit_hit": True}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    set_aside()


def _no_gradients(suite: str) -> contextlib.AbstractContextManager[Any]:
    if suite == "cpu":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()
