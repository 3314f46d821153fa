"""The device at hand: what is missing for a run, how it is named in a record, and the state that it was found in."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from onetrans.bench.environment import environment
from onetrans.errors import MissingDependencyError

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "onetrans"
TESTS = ROOT / "parity_tests"
TEST_FILES = "test_triton_*.py"
ASKED = ("name", "driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "pstate")


def check_device() -> None:
    """Sees that a GPU and everything else is there.

    Raises:
        MissingDependencyError: Something is not.
    """
    for package in ("torch", "triton", "pytest"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(f"the GPU suite needs the package {package}, which is not installed")
    import torch

    if torch.version.cuda is None:
        raise MissingDependencyError(
            f"the GPU suite needs a CUDA device, and torch {torch.__version__} is built without CUDA; install a CUDA"
            " build, or try the suite's code with --rehearse"
        )
    if not torch.cuda.is_available():
        raise MissingDependencyError(
            "the GPU suite needs a CUDA device, and torch sees none; look at the driver (nvidia-smi), or try the"
            " suite's code with --rehearse"
        )


def device_name() -> str:
    """As the driver gives it; `rehearsal` without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "rehearsal"


def key(*, look: bool) -> dict[str, Any]:
    """What must be equal for a held measure to stand: device, versions and the source of the package."""
    import torch

    return {
        "device": device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": importlib.metadata.version("triton"),
        "source_sha256": digest(path for path in SOURCE.rglob("*") if path.suffix in (".py", ".json")),
        "quick": look,
    }


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 over names and contents of files below the root."""
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def tests_digest() -> str:
    """Of the GPU tests."""
    return digest([*TESTS.glob(TEST_FILES), TESTS / "triton_device.py"])


def surroundings(commit: str | None = None) -> dict[str, Any]:
    """Machine, libraries, source and the device's state now.

    Args:
        commit: To note where there is no checkout to ask.
    """
    found = environment()
    if found["commit"] is None:
        found["commit"] = commit
    return {**found, "gpu": device_state()}


def device_state() -> dict[str, Any]:
    """Size of the device, and what nvidia-smi reads off it: clocks in MHz, temperature in °C, power in W."""
    import torch

    if not torch.cuda.is_available():
        return {}
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    found: dict[str, Any] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    which = str(getattr(properties, "uuid", ""))
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader,nounits"]
    for one in (["-i", f"GPU-{which}"], []):
        try:
            done = subprocess.run([*command, *one], capture_output=True, text=True, timeout=20, check=False)
            if done.returncode == 0 and done.stdout.strip():
                values = map(str.strip, done.stdout.strip().splitlines()[0].split(","))
                return found | dict(zip(ASKED, values, strict=True))
        except (OSError, ValueError, subprocess.TimeoutExpired):
            continue
    return found
