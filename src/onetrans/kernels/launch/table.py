"""The committed table of tuned configurations, and the choice between it and the analytical default."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from onetrans.kernels.launch.config import Device, LaunchConfig, Problem, bucket

TABLE = Path(__file__).with_name("tuned.json")  # {device name: {"capability": 90, "ops": {op: {dtype: {key: fields}}}}}
VARIABLE = "ONETRANS_BATCH_INVARIANT"
TABLE_VARIABLE = "ONETRANS_TUNED_TABLE"  # another table's path, as of one that was tuned into a folder of its own


def batch_invariant() -> bool:
    """Whether a row's result may not depend on how many rows there are; `ONETRANS_BATCH_INVARIANT=0` gives that up."""
    return os.environ.get(VARIABLE, "1") != "0"


def problem(op: str, dtype: str, rows: int, **sizes: int) -> Problem:
    """A problem; its number of rows counts only where batch invariance is given up."""
    return Problem(
        op=op, dtype=dtype, sizes=tuple(sorted(sizes.items())), rows=None if batch_invariant() else bucket(rows)
    )


def table_path() -> Path:
    """The table in force: that of `ONETRANS_TUNED_TABLE`, or the committed one."""
    return Path(os.environ.get(TABLE_VARIABLE) or TABLE)


@functools.cache
def tuned() -> Mapping[tuple[str, str, str, str], LaunchConfig]:
    """The table, by device name, op, dtype and key."""
    return {
        (device, op, dtype, key): LaunchConfig(**fields)
        for device, body in json.loads(table_path().read_text(encoding="utf-8")).items()
        for op, dtypes in body["ops"].items()
        for dtype, keys in dtypes.items()
        for key, fields in keys.items()
    }


def tuned_devices() -> list[Device]:
    """The devices that the table has configurations for."""
    body = json.loads(table_path().read_text(encoding="utf-8"))
    return [Device(capability=found["capability"], name=name) for name, found in body.items()]


@functools.cache
def choose(problem: Problem, device: Device, default: Callable[[Problem, Device], LaunchConfig]) -> LaunchConfig:
    """The tuned configuration where the table has one for this device and problem, else the analytical default."""
    if problem.op in _forced:
        return _forced[problem.op]
    return tuned().get((device.name, problem.op, problem.dtype, problem.key)) or default(problem, device)


_forced: dict[str, LaunchConfig] = {}


@contextlib.contextmanager
def forced(op: str, config: LaunchConfig) -> Iterator[None]:
    """Makes `choose` give this configuration for an op, whatever the problem, while a tuner times it."""
    _forced[op] = config
    choose.cache_clear()
    try:
        yield
    finally:
        del _forced[op]
        choose.cache_clear()
