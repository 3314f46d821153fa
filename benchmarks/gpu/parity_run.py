"""Runs the GPU tests in a process of its own, before anything is timed."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.device import ROOT, TEST_FILES, TESTS
from benchmarks.gpu.measure import Context, Outcome
from benchmarks.measure import Row

MOST_WORKERS = 8
COUNTED = ("passed", "failed", "skipped")


def run_tests(context: Context, seconds: float) -> Outcome:
    """pytest on the kernels' tests, in parallel where pytest-xdist is installed.

    Args:
        context: Of the run.
        seconds: After so many the tests are ended, and count as failed.
    """
    outcome = Outcome()
    files = sorted(str(path.relative_to(ROOT)) for path in TESTS.glob(TEST_FILES))
    if not files:
        outcome.failed = f"there are no tests {TESTS.name}/{TEST_FILES}"
        return outcome
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider"]
    command += ["--noconftest", *files]  # what the other tests need may not be installed here
    workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)) // 2)
    if importlib.util.find_spec("xdist") is not None and workers > 1:
        command += ["-n", str(workers)]
    context.progress(f"{' '.join(files)}, {workers} at a time" if "-n" in command else " ".join(files))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="onetrans-tests-") as folder:
        report, printed = Path(folder) / "report.xml", Path(folder) / "printed"
        status = run_within([*command, f"--junitxml={report}"], seconds, printed)
        text = printed.read_text(encoding="utf-8", errors="replace")
        counts, failures = read_report(report)
    taken = time.perf_counter() - began
    print("\n".join(text.splitlines()[-60:]), file=sys.stderr)
    outcome.rows = [
        Row(what=f"GPU tests that {name}", unit="", value=counts[name], target=0 if name == "failed" else None)
        for name in COUNTED
    ]
    outcome.rows.append(Row(what="GPU tests, seconds", unit="s", value=taken))
    outcome.notes = failures[:40]
    if status is None:
        outcome.failed = f"the tests did not end within {seconds:.0f} s; run again, or with a larger --budget"
    elif status or not counts["passed"]:
        last = (text.strip().splitlines() or ["no message"])[-1]
        outcome.failed = f"pytest exited with {status}: {failures[0] if failures else last}"
    return outcome


def run_within(command: list[str], seconds: float, printed: Path) -> int | None:
    """The command's exit status, or None where it was ended; what it prints goes into a file."""
    with (
        printed.open("wb") as file,
        subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True) as process,
    ):
        try:
            return process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def read_report(path: Path) -> tuple[dict[str, int], list[str]]:
    """Counts of a JUnit report, and a line for each failed test; all zero where there is none."""
    counts, failures = dict.fromkeys(COUNTED, 0), []
    if not path.exists():
        return counts, failures
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        broken = next((found for kind in ("failure", "error") if (found := case.find(kind)) is not None), None)
        kind = "failed" if broken is not None else "skipped" if case.find("skipped") is not None else "passed"
        counts[kind] += 1
        if broken is not None:
            message = re.sub(r"\s+", " ", broken.get("message") or "")[:200]
            failures.append(f"{case.get('classname')}::{case.get('name')}: {message}")
    return counts, failures
