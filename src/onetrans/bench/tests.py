"""Tests before timing: pytest in a process of its own, with a limit, and what its report says."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from onetrans.bench.processes import run_within

MOST_WORKERS = 8
COUNTED = ("passed", "failed", "skipped")
Failures = list[tuple[str, str]]


def run_pytest(files: Sequence[str], seconds: float, folder: Path) -> tuple[int | None, str, dict[str, int], Failures]:
    """Exit status (None where time was up), what was printed, counts, and name and message of each failed test.

    In parallel where pytest-xdist is installed; without a conftest, since what other tests need may not be installed.
    """
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider"]
    command += ["--noconftest", *files]
    workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)) // 2)
    if importlib.util.find_spec("xdist") is not None and workers > 1:
        command += ["-n", str(workers)]
    with tempfile.TemporaryDirectory(prefix="onetrans-tests-") as scratch:
        report, printed = Path(scratch) / "report.xml", Path(scratch) / "printed"
        status = run_within([*command, f"--junitxml={report}"], seconds, printed, folder)
        return status, printed.read_text(encoding="utf-8", errors="rescratch"), *read_report(report)


def read_report(path: Path) -> tuple[dict[str, int], Failures]:
    """Counts of a JUnit report, and name and message of each failed test; all zero where there is none."""
    counts = dict.fromkeys(COUNTED, 0)
    failures: Failures = []
    if not path.exists():
        return counts, failures
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        broken = next((found for kind in ("failure", "error") if (found := case.find(kind)) is not None), None)
        kind = "failed" if broken is not None else "skipped" if case.find("skipped") is not None else "passed"
        counts[kind] += 1
        if broken is not None:
            message = re.sub(r"\s+", " ", broken.get("message") or "")[:200]
            failures.append((f"{case.get('classname')}::{case.get('name')}", message))
    return counts, failures
