"""Where a measurement was made: machine, libraries and the state of the source."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import onetrans

PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "torch", "onnx", "onnxscript", "safetensors", "triton")
RESULTS = "benchmarks/results"  # what a suite writes, and so no change of what it measures


def environment() -> dict[str, Any]:
    """Date, commit, machine and library versions, as plain data; bytes and counts, nothing that names the host."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **source(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": round(os.getloadavg()[0], 2),
        "os": platform.platform(),
        "python": platform.python_version(),
        "libraries": libraries(),
    }


def source() -> dict[str, Any]:
    """`commit`, whether the tree is `dirty`, and `changes`, a digest of what differs; None outside a checkout."""
    root = Path(onetrans.__file__).resolve().parents[2]
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top.strip()) != root:  # installed as a wheel, maybe inside another project's checkout
        return {"commit": None, "dirty": None, "changes": None}
    commit = _git(root, "rev-parse", "HEAD")
    paths = ("--", ".", f":(exclude){RESULTS}", ":(exclude)README.md")
    status = _git(root, "status", "--porcelain", *paths) or ""
    changes = status + (_git(root, "diff", "HEAD", *paths) or "")
    return {
        "commit": commit.strip() if commit else None,
        "dirty": bool(status),
        "changes": hashlib.sha256(changes.encode()).hexdigest()[:12] if status else None,
    }


def cpu_model() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def libraries() -> dict[str, str]:
    """Versions of what is installed of PACKAGES, and of this package."""
    found = {"onetrans-export": onetrans.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
