"""The CPU suite: `python -m benchmarks.cpu`. Resumable: what the record holds of this commit is not repeated."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.context import ROOT, Context
from benchmarks.matmul import decode_vs_matmul, prefill_vs_matmul
from benchmarks.measure import Measured, Row
from benchmarks.plain import export_time, latency, parity
from benchmarks.request import request_vs_unsplit
from benchmarks.soak import soak
from benchmarks.state import append, append_growth, returning, tiers
from benchmarks.suite import format_row, new_suite, read_suite
from onetrans.bench.environment import cpu_model, environment, libraries, source
from onetrans.bench.record import command, config_hash, write_json
from onetrans.errors import OneTransError
from onetrans.model.presets import preset

MEASURES: dict[str, Callable[[Context], Measured]] = {
    "export_time": export_time,
    "parity": parity,
    "decode_vs_matmul": decode_vs_matmul,
    "prefill_vs_matmul": prefill_vs_matmul,
    "request_vs_unsplit": request_vs_unsplit,
    "latency": latency,
    "append": append,
    "append_growth": append_growth,
    "returning": returning,
    "tiers": tiers,
    "soak": soak,
}


@click.command()
@click.option("--quick", is_flag=True, help="Few samples, for a look; needs --output, since such records are not kept.")
@click.option("--only", type=click.Choice(list(MEASURES)), multiple=True, help="Only this measure; may be repeated.")
@click.option("--fresh", is_flag=True, help="Measure again what the record holds already.")
@click.option("--threads", default=2, show_default=True, help="Of every engine.")
@click.option(
    "--work", type=click.Path(path_type=Path), help="Keep bundles and graphs here.  [default: a temporary folder]"
)
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="[default: benchmarks/results/cpu.json]"
)
def main(quick: bool, only: tuple[str, ...], fresh: bool, threads: int, work: Path | None, output: Path | None) -> None:
    """Measure on the CPU, and keep a record."""
    if quick and output is None:
        raise click.UsageError("--quick needs --output FILE: its few samples do not belong into the kept record")
    if threads < 1:
        raise click.UsageError(f"--threads is {threads}; it must be at least 1")
    try:
        if work is not None:
            _run(quick, only, fresh, threads, work.resolve(), output)
            return
        with tempfile.TemporaryDirectory(prefix="onetrans-bench-") as folder:
            _run(quick, only, fresh, threads, Path(folder), output)
    except OneTransError as error:
        _say(f"error: {error}")
        raise SystemExit(error.exit_status) from None


def _run(quick: bool, only: tuple[str, ...], fresh: bool, threads: int, work: Path, output: Path | None) -> None:
    output = output or ROOT / "benchmarks" / "results" / "cpu.json"
    key = measure_key(quick, threads)
    record = read_suite(output) if output.exists() else new_suite("cpu")
    name_of_source = "-".join(filter(None, (str(key["commit"])[:12], key["changes"])))
    for name in only or MEASURES:
        held = record["measures"].get(name)
        if not fresh and held is not None and held["key"] == key:
            _say(f"{name}: held already, of this commit and configuration (--fresh measures again)")
            continue
        _say(f"{name}:")
        context = Context(
            work=work, source=name_of_source, threads=threads, quick=quick, progress=lambda line: _say(f"  {line}")
        )
        began = time.perf_counter()
        where = environment()
        measured = MEASURES[name](context)
        record["measures"][name] = {
            "key": key,
            "environment": where,
            "command": command(),
            "seconds": round(time.perf_counter() - began, 1),
            "rows": [plain_row(row) for row in measured.rows],
            "notes": list(measured.notes),
            "samples": {sample: list(values) for sample, values in measured.samples.items()},
            "records": dict(measured.records),
            "tables": {title: [list(row) for row in table] for title, table in measured.tables.items()},
        }
        record["measures"] = {n: record["measures"][n] for n in MEASURES if n in record["measures"]}
        write_json(output, record)
        for row in measured.rows:
            _say("  " + format_row(plain_row(row)))
        for note in measured.notes:
            _say(f"  ({note})")
    _say(f"record: {output}")


def measure_key(quick: bool, threads: int) -> dict[str, Any]:
    """What must be equal for a held measure to stand: source, configuration, machine and libraries."""
    configs = {name: preset(name).to_json() for name in (Context.small, Context.large)}
    return {
        **source(),
        "config_sha256": config_hash(configs),
        "quick": quick,
        "threads": threads,
        "cpu": cpu_model(),
        "libraries": libraries(),
    }


def plain_row(row: Row) -> dict[str, Any]:
    """A row as plain data, with its verdict."""
    return {**dataclasses.asdict(row), "met": row.met}


def _say(line: str) -> None:
    click.echo(line, err=True)


if __name__ == "__main__":
    main()
