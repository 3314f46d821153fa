"""`onetrans doctor`."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
from dataclasses import dataclass

import click
from rich.markup import escape
from rich.table import Table

from onetrans import __version__
from onetrans.cli.console import print_json, print_table
from onetrans.cli.options import Verb, json_option
from onetrans.errors import ConfigError
from onetrans.runtime import targets

OWN_PACKAGES = ("numpy", "safetensors", "pyarrow", "triton")


@dataclass(frozen=True)
class Ability:
    """Something that this machine can do if packages are there; of those in one tuple any one will do."""

    name: str
    packages: tuple[tuple[str, ...], ...]
    hint: str


def abilities() -> list[Ability]:
    """What any target of this installation, training and logs need."""
    found = [
        Ability("read and write Parquet logs", (("pyarrow",),), f'pip install "{targets.PACKAGE}[serve]"'),
        Ability("train", (("torch",), ("pyarrow",)), f'pip install "{targets.PACKAGE}[cpu]"'),
    ]
    for name in targets.names():
        try:
            row = targets.find(name)
        except ConfigError as error:  # another package's, which doctor is there to tell
            found.append(Ability(f"use target {name}", ((name,),), str(error)))
            continue
        found.append(Ability(f"export to {row.name}", row.export_packages, row.install_hint(row.export_extra)))
        found.append(Ability(f"serve {row.name} bundles", row.serve_packages, row.install_hint(row.serve_extra)))
    return found


@click.command("doctor", cls=Verb, examples=("onetrans doctor",))
@json_option
def doctor_command(as_json: bool) -> None:
    """Say what this machine can run.

    Where something is missing, the command that installs it is shown.
    """
    wanted = abilities()
    versions = {package: _version(package) for package in dict.fromkeys((*OWN_PACKAGES, *targets.packages()))}
    missing = {one.name: [names[0] for names in one.packages if not any(map(_version, names))] for one in wanted}
    devices = cuda_devices()
    found = {
        "onetrans-export": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "cuda_devices": devices,
        "packages": versions,
        "missing": missing,
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
    for one in wanted:
        hint = escape(f"needs {', '.join(missing[one.name])}: {one.hint}")
        table.add_row(one.name, f"[red]{hint}[/]" if missing[one.name] else "[green]ready[/]")
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
