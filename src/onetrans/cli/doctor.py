"""`onetrans doctor`."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform

import click
from rich.table import Table

from onetrans import __version__
from onetrans.cli.console import print_json, print_table
from onetrans.cli.options import Verb, json_option

PACKAGES = (
    "numpy",
    "safetensors",
    "onnxruntime",
    "onnxruntime-gpu",
    "pyarrow",
    "torch",
    "onnx",
    "onnxscript",
    "triton",
)
NEEDS = {
    "serve an onnx bundle": ("onnxruntime",),
    "read and write Parquet logs": ("pyarrow",),
    "train": ("torch", "pyarrow"),
    "export to onnx": ("torch", "onnx", "onnxscript", "onnxruntime"),
}
ALTERNATIVES = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu")}
EXTRAS = {"serve an onnx bundle": "serve", "read and write Parquet logs": "serve"}


@click.command("doctor", cls=Verb, examples=("onetrans doctor",))
@json_option
def doctor_command(as_json: bool) -> None:
    """Say what this machine can run.

    Where something is missing, the command that installs it is shown.
    """
    versions = {package: _version(package) for package in PACKAGES}
    abilities = {}
    for ability, packages in NEEDS.items():
        missing = [p for p in packages if not any(versions[name] for name in ALTERNATIVES.get(p, (p,)))]
        abilities[ability] = missing
    devices = cuda_devices()
    found = {
        "onetrans-export": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "cuda_devices": devices,
        "packages": versions,
        "missing": abilities,
    }
    if as_json:
        print_json(found)
        return
    table = Table(title=f"onetrans-export {__version__}, Python {platform.python_version()}, {found['machine']}")
    table.add_column("part")
    table.add_column("state")
    for package, version in versions.items():
        table.add_row(package, version or "[dim]not installed[/]")
    table.add_row("CUDA devices", str(devices) if devices is not None else "[dim]no driver[/]")
    for ability, missing in abilities.items():
        hint = f'needs {", ".join(missing)}: pip install "onetrans-export\\[{EXTRAS.get(ability, "cpu")}]"'
        table.add_row(ability, f"[red]{hint}[/]" if missing else "[green]ready[/]")
    print_table(table)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cuda_devices() -> int | None:
    """Asks the driver itself for the number of CUDA devices; None where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value
