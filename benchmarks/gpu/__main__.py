"""The GPU suite: `python -m benchmarks.gpu`. What the record holds of this device and source is not repeated."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click

from onetrans.errors import OneTransError


@click.command()
@click.option(
    "--budget",
    type=click.FloatRange(min=1),
    default=450.0,
    show_default=True,
    help="Seconds after which no measure starts.",
)
@click.option("--only", multiple=True, metavar="NAME", help="Only these measures: a name, its beginning, or a pattern.")
@click.option("--list", "listed", is_flag=True, help="Name the measures and what each should take.")
@click.option("--fresh", is_flag=True, help="Measure again what the record holds already.")
@click.option("--tune", is_flag=True, help="Time launch configurations, and keep those that win in the tuned table.")
@click.option("--rehearse", is_flag=True, help="Run the suite's code on the CPU at tiny sizes, and keep nothing.")
@click.option("--look", is_flag=True, help="Time although tests failed; needs --output, since that is not kept.")
@click.option("--json", "as_json", is_flag=True, help="Print the record on stdout.")
@click.option("--commit", help="Noted as the commit where there is no checkout.")
@click.option(
    "--cache", type=click.Path(path_type=Path), help="Keep compiled kernels here.  [default: a temporary folder]"
)
@click.option("--alone", type=click.Path(path_type=Path), hidden=True)
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="[default: benchmarks/results/gpu.json]"
)
def main(cache: Path | None, listed: bool, tune: bool, as_json: bool, **given: Any) -> None:
    """Measure on the GPU, and keep a record."""
    if given["rehearse"]:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    try:
        if listed:
            _list()
            return
        with tempfile.TemporaryDirectory(prefix="onetrans-gpu-", ignore_cleanup_errors=True) as folder:
            raise SystemExit(_run(cache.resolve() if cache else Path(folder), tune, as_json, given))
    except OneTransError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_status) from None


def _run(cache: Path, tune: bool, as_json: bool, given: dict[str, Any]) -> int:
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))
    from benchmarks.gpu.device import check_device

    if not given["rehearse"]:
        check_device()
    from benchmarks.gpu.run import Options, run
    from benchmarks.gpu.tune import tune as tune_kernels

    options = Options(**{name: value for name, value in given.items() if value is not None})
    status = tune_kernels(options) if tune else run(options)
    if as_json and options.output.exists() and not options.rehearse:
        print(json.dumps(json.loads(options.output.read_text(encoding="utf-8"))))
    return status


def _list() -> None:
    from benchmarks.gpu.catalogue import measures

    for measure in measures().values():
        click.echo(f"{measure.name:45} about {measure.seconds:.0f} s")


if __name__ == "__main__":
    main()
