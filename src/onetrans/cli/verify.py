"""`onetrans verify`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import click
from rich.table import Table

from onetrans.cli.console import bundle_json, print_json, print_table, stages
from onetrans.cli.options import (
    FROM_0,
    Verb,
    bundle_argument,
    device_option,
    folder_option,
    json_option,
    threads_option,
)
from onetrans.errors import ParityError
from onetrans.parity.cases import ParityCase, read_cases
from onetrans.parity.comparison import CaseResult
from onetrans.parity.verify import check, verify
from onetrans.runtime.backends.base import BackendOptions
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.targets import open_backend


@click.command(
    "verify", cls=Verb, examples=("onetrans verify bundle", "onetrans verify bundle --checkpoint checkpoint")
)
@bundle_argument
@folder_option(
    "--checkpoint",
    show_default="the cases in the bundle",
    help="The checkpoint that the bundle was made from: its float64 reference is then computed here, on new cases.",
)
@click.option(
    "--seed",
    type=FROM_0,
    default=1,
    show_default=True,
    help="The seed of the new cases that --checkpoint asks for, a whole number.",
)
@device_option
@threads_option
@json_option
def verify_command(
    bundle: Path, checkpoint: Path | None, seed: int, device: str | None, threads: int | None, as_json: bool
) -> None:
    """Compare a bundle's scores with the float64 reference.

    BUNDLE is a folder that `onetrans export` wrote. Shown are the errors and the rank agreement of each parity case.
    Exits 1 where a case is beyond its bound: 1.5 times the error of plain PyTorch in the same precision, plus 4 ulp.
    """
    opened = Bundle.open(bundle)
    with stages(f"verifying {bundle}") as progress:
        progress("load")
        backend = open_backend(opened, device, BackendOptions(threads=threads))
        cases = _fresh_cases(opened, checkpoint, seed, progress) if checkpoint else read_cases(opened)
        results = verify(backend, cases, progress)
    passed = all(result.passed for result in results)
    if as_json:
        cases_json = [dataclasses.asdict(result) for result in results]
        print_json({"bundle": bundle_json(opened), "passed": passed, "cases": cases_json})
    else:
        print_table(_table(results))
    check(results)


def _fresh_cases(bundle: Bundle, checkpoint: Path, seed: int, progress: Callable[[str], None]) -> list[ParityCase]:
    from onetrans.export.models.base import adapt
    from onetrans.model.checkpoint import load_checkpoint

    progress("reference")
    model = adapt(load_checkpoint(checkpoint))
    if model.weights_sha256() != bundle.manifest.weights_sha256:
        raise ParityError(f"{checkpoint} holds other weights than {bundle.path} was made from; export it again")
    return model.cases(bundle.manifest.bounds, seed)


def _table(results: list[CaseResult]) -> Table:
    table = Table(title="bundle against the float64 reference")
    for column in ("case", "users", "cand.", "error", "bound", "PyTorch", "relative", "top 10", "rank corr.", ""):
        table.add_column(column, justify="left" if column == "case" else "right")
    for r in results:
        verdict = "[green]pass[/]" if r.passed else "[red]FAIL[/]"
        numbers = (f"{r.error:.1e}", f"{r.bound:.1e}", f"{r.eager_error:.1e}", f"{r.relative_error:.1e}")
        table.add_row(
            r.name, str(r.users), str(r.candidates), *numbers, f"{r.top_k:.2f}", f"{r.rank_correlation:.4f}", verdict
        )
    return table
