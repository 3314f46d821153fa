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
from onetrans.runtime import targets

OWN_PACKAGES = ("numpy", "safetensors", "triton")  # beside what the table of targets names
WRITTEN = (
    "benchmarks/results",
    "docs/benchmarks.md",
    "README.md",
)  # what a suite writes, no change of what it measures
ASKED = ("name", "driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "pstate")


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
    paths = ("--", ".", *(f":(exclude){path}" for path in WRITTEN))
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


def gpu_state() -> dict[str, Any]:
    """The current CUDA device: its size, and what nvidia-smi reads off it: clocks in MHz, °C, W; empty without one."""
    import torch

    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    found: dict[str, Any] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    query = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader,nounits"]
    for one in (["-i", f"GPU-{getattr(properties, 'uuid', '')}"], []):
        try:
            done = subprocess.run([*query, *one], capture_output=True, text=True, timeout=20, check=False)
            if done.returncode == 0 and done.stdout.strip():
                values = map(str.strip, done.stdout.strip().splitlines()[0].split(","))
                return found | dict(zip(ASKED, values, strict=True))
        except (OSError, ValueError, subprocess.TimeoutExpired):
            continue
    return found


def libraries() -> dict[str, str]:
    """Versions of this package, and of what is installed of its own and of its targets' packages."""
    found = {"onetrans-export": onetrans.__version__}
    for package in (*OWN_PACKAGES, *targets.packages()):
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
