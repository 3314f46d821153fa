"""`onetrans verify`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import click
from rich.table import Table

from onetrans.cli.console import bundle_json, print_json, print_table, stages
from onetrans.cli.options import FROM_0, Verb, bundle_argument, folder_option, json_option, threads_option
from onetrans.errors import ParityError
from onetrans.parity.verify import CaseResult, StoredCase, check, read_cases, verify
from onetrans.runtime.backends.registry import open_backend
from onetrans.runtime.bundle import Bundle


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
@threads_option
@json_option
def verify_command(bundle: Path, checkpoint: Path | None, seed: int, threads: int | None, as_json: bool) -> None:
    """Compare a bundle's scores with the float64 reference.

    BUNDLE is a folder that `onetrans export` wrote. Shown are the errors and the rank agreement of each parity case.
    Exits 1 where a case is beyond its bound: 1.5 times the error of plain PyTorch in the same precision, plus 4 ulp.
    """
    opened = Bundle.open(bundle)
    with stages(f"verifying {bundle}") as progress:
        progress("load")
        backend = open_backend(opened, threads=threads)
        cases = _fresh_cases(opened, checkpoint, seed, progress) if checkpoint else read_cases(opened)
        results = verify(opened, backend, cases, progress)
    passed = all(result.passed for result in results)
    if as_json:
        cases_json = [dataclasses.asdict(result) for result in results]
        print_json({"bundle": bundle_json(opened), "passed": passed, "cases": cases_json})
    else:
        print_table(_table(results))
    check(results)


def _fresh_cases(bundle: Bundle, checkpoint: Path, seed: int, progress: Callable[[str], None]) -> list[StoredCase]:
    from onetrans.export.gold import build_cases
    from onetrans.model.checkpoint import load_checkpoint, weights_hash

    progress("reference")
    model = load_checkpoint(checkpoint)
    if weights_hash(model) != bundle.manifest.weights_sha256:
        raise ParityError(f"{checkpoint} holds other weights than {bundle.path} was made from; export it again")
    bounds = bundle.manifest.bounds
    return build_cases(model, max_candidates=bounds["C"][1], max_users=bounds["U"][1], seed=seed)


def _table(results: list[CaseResult]) -> Table:
    table = Table(title="bundle against the float64 reference")
    for column in ("case", "users", "cand.", "error", "bound", "PyTorch", "relative", "top 10", "rank corr.", ""):
        table.add_column(column, justify="left" if column == "case" else "right")
    for r in results:
        verdict = "[green]pass[/]" if r.passed else "[red]FAIL[/]"
        numbers = (f"{r.error:.1e}", f"{r.bound:.1e}", f"{r.reference_error:.1e}", f"{r.relative_error:.1e}")
        table.add_row(
            r.name, str(r.users), str(r.candidates), *numbers, f"{r.top_k:.2f}", f"{r.rank_correlation:.4f}", verdict
        )
    return table
