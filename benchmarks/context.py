"""What measures share: the work folder with its bundles, subprocesses, and the machine's rates."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reckoning import Machine, measure_machine
from onetrans.errors import JobError

ROOT = Path(__file__).resolve().parents[1]
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An export in a process of its own: wall seconds, most resident bytes, and the bundle."""

    seconds: float
    peak_bytes: int
    bundle: Path


@dataclass(frozen=True, kw_only=True)
class Context:
    """Of one run of a suite.

    Attributes:
        work: Folder for bundles and graphs, outside the repository.
        source: Names the state of the source, so that a kept work folder holds nothing stale.
        threads: Of every engine.
        quick: Few samples.
        large: Preset of the model that targets are stated for.
        progress: Takes a line for the reader.
    """

    work: Path
    source: str
    threads: int
    quick: bool
    progress: Callable[[str], None]
    large: str = "onetrans-s"
    small: str = "tiny"

    def rounds(self, full: int) -> int:
        """Rounds to measure."""
        return 5 if self.quick else full

    def place(self, name: str) -> Path:
        """A path in the work folder for this state of the source."""
        folder = self.work / self.source
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def bundle(self, preset: str) -> Path:
        """The preset's bundle with random weights, exported when first needed."""
        path = self.place(preset)
        if not path.exists():
            self.progress(f"exporting {preset}")
            self.export(preset, path)
        return path

    def export(self, preset: str, output: Path) -> Exported:
        """Exports in a process of its own, with the command a user would type."""
        options = ("--preset", preset, "--random-weights", "--seed", str(SEED), "--output", str(output))
        seconds, peak = _measure_process([sys.executable, "-m", "onetrans.cli.main", "export", *options])
        return Exported(seconds=seconds, peak_bytes=peak, bundle=output)

    def module(self, name: str, arguments: Sequence[str], text: str = "") -> Any:
        """Runs a module of this folder in a process of its own, and gives the JSON that it prints."""
        done = subprocess.run(
            [sys.executable, "-m", name, *arguments],
            input=text,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment(),
            check=False,
        )
        if done.returncode:
            raise JobError(f"{name} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        return json.loads(done.stdout)

    @contextlib.contextmanager
    def server(self, name: str, arguments: Sequence[str]) -> Iterator[Callable[[str], str]]:
        """Runs a module of this folder that answers each line with a line; gives the function that asks it."""
        with (
            tempfile.TemporaryFile(mode="w+") as errors,
            subprocess.Popen(
                [sys.executable, "-m", name, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                bufsize=1,
                cwd=ROOT,
                env=environment(),
            ) as process,
        ):

            def ask(line: str) -> str:
                assert process.stdin is not None
                assert process.stdout is not None
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(line + "\n")
                    process.stdin.flush()
                answer = process.stdout.readline()
                if not answer:
                    errors.seek(0)
                    raise JobError(f"{name} failed: {(errors.read().strip().splitlines() or ['no message'])[-1]}")
                return answer

            try:
                yield ask
            finally:
                process.terminate()

    @functools.cached_property
    def machine(self) -> Machine:
        """The rates that predictions rest on, measured once."""
        self.progress("measuring the machine's rates")
        return measure_machine(self.threads)


def environment() -> dict[str, str]:
    """The variables for a subprocess, so that it finds this checkout's packages wherever it runs."""
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _measure_process(command: Sequence[str]) -> tuple[float, int]:
    """Wall seconds and most resident bytes of a process.

    Raises:
        JobError: It failed.
    """
    with tempfile.TemporaryFile(mode="w+") as errors:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=errors, stdin=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            message = (errors.read().strip().splitlines() or ["no message"])[-1]
            raise JobError(f"{' '.join(command[1:])} failed: {message}")
    return seconds, usage.ru_maxrss * 1024
