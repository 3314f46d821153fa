"""Processes of their own for what is measured: timed whole, answering line by line, or ended in time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from onetrans.errors import JobError


def last_line(text: str) -> str:
    """The last line of what a process printed."""
    return (text.strip().splitlines() or ["no message"])[-1]


def measure_process(command: Sequence[str], folder: Path, variables: Mapping[str, str]) -> tuple[float, int]:
    """Wall seconds and most resident bytes of a process.

    Raises:
        JobError: It failed.
    """
    with tempfile.TemporaryFile(mode="w+") as errors:
        began, null = time.perf_counter(), subprocess.DEVNULL
        process = subprocess.Popen(command, cwd=folder, env=variables, stdout=null, stderr=errors, stdin=null)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise JobError(f"{' '.join(command[1:])} failed: {last_line(errors.read())}")
    return seconds, usage.ru_maxrss * 1024


@contextlib.contextmanager
def answering(command: Sequence[str], folder: Path, variables: Mapping[str, str]) -> Iterator[Callable[[str], str]]:
    """Runs a process that answers each line with a line; gives the function that asks it, which raises JobError."""
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile(mode="w+") as errors,
        subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=errors, text=True, bufsize=1, cwd=folder, env=variables
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
                raise JobError(f"{' '.join(command[1:])} failed: {last_line(errors.read())}")
            return answer

        try:
            yield ask
        finally:
            process.terminate()


def run_within(command: Sequence[str], seconds: float, printed: Path, folder: Path) -> int | None:
    """The command's exit status, or None where it was ended; what it prints goes into a file."""
    with (
        printed.open("wb") as file,
        subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT, start_new_session=True) as process,
    ):
        try:
            return process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
