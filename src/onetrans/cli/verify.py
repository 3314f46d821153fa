"""`onetrans verify`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
from rich.table import Table

from onetrans.cli.console import print_json, print_table, stages
from onetrans.errors import ParityError
from onetrans.parity.cases import ParityCase, read_cases
from onetrans.parity.comparison import CaseResult
from onetrans.parity.verify import check, verify
from onetrans.runtime.backends.base import BackendOptions
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.targets import open_backend


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Compute fresh gold from these weights, on cases of --seed, instead of using what the bundle carries.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Of the cases made with --checkpoint."
)
@click.option("--threads", type=click.IntRange(min=1), help="Of the backend.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify_command(bundle: Path, checkpoint: Path | None, seed: int, threads: int | None, as_json: bool) -> None:
    """Compare a bundle with its float64 gold: errors and rank agreement, case by case.

    Exits 1 where a case is beyond its bound: 1.5 times the error of plain PyTorch in the same dtype, plus 4 ulp.
    """
    opened = Bundle.open(bundle)
    with stages(f"verifying {bundle}") as progress:
        progress("load")
        backend = open_backend(opened, options=BackendOptions(threads=threads))
        cases = _fresh_cases(opened, checkpoint, seed, progress) if checkpoint else read_cases(opened)
        results = verify(backend, cases, progress)
    passed = all(result.passed for result in results)
    if as_json:
        print_json({"bundle": str(bundle), "passed": passed, "cases": [dataclasses.asdict(r) for r in results]})
    else:
        print_table(_table(results))
    check(results)


def _fresh_cases(bundle: Bundle, checkpoint: Path, seed: int, progress) -> list[ParityCase]:  # type: ignore[no-untyped-def]
    from onetrans.export.models.base import adapt
    from onetrans.model.checkpoint import load_checkpoint

    progress("reference")
    model = adapt(load_checkpoint(checkpoint))
    if model.weights_sha256() != bundle.manifest.weights_sha256:
        raise ParityError(f"{checkpoint} holds other weights than {bundle.path} was made from; export it again")
    return model.cases(bundle.manifest.bounds, seed)


def _table(results: list[CaseResult]) -> Table:
    table = Table(title="bundle against float64 gold")
    for column in ("case", "users", "cand.", "error", "bound", "PyTorch", "relative", "top 10", "rank corr.", ""):
        table.add_column(column, justify="left" if column == "case" else "right")
    for r in results:
        verdict = "[green]pass[/]" if r.passed else "[red]FAIL[/]"
        numbers = (f"{r.error:.1e}", f"{r.bound:.1e}", f"{r.eager_error:.1e}", f"{r.relative_error:.1e}")
        table.add_row(
            r.name, str(r.users), str(r.candidates), *numbers, f"{r.top_k:.2f}", f"{r.rank_correlation:.4f}", verdict
        )
    return table
