"""`onetrans score`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.progress import track
from rich.table import Table

from onetrans.cli.cache import cache_options
from onetrans.cli.console import print_json, print_table, stderr
from onetrans.errors import DataError, OutputExistsError
from onetrans.features.requests import Request, read_requests
from onetrans.files import write_new_text
from onetrans.runtime.backends.base import BackendOptions
from onetrans.runtime.cache.config import CacheConfig
from onetrans.runtime.ranker import Ranker, Scores

POSITIVE = click.IntRange(min=1)


@click.command("score")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--input", "source", required=True, type=click.Path(path_type=Path), help="Requests: a JSON file or a log folder."
)
@click.option("--output", type=click.Path(path_type=Path), help="Write the scores to this new JSON file.")
@click.option("--top", type=POSITIVE, default=10, show_default=True, help="Candidates shown per request in the table.")
@click.option("--limit", type=POSITIVE, help="Score only the first requests.")
@click.option("--threads", type=POSITIVE, help="Of the backend.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@cache_options
def score_command(
    bundle: Path,
    source: Path,
    output: Path | None,
    top: int,
    limit: int | None,
    threads: int | None,
    as_json: bool,
    cache: CacheConfig | None,
) -> None:
    """Score requests from JSON or Parquet with a bundle."""
    if output is not None and (output.exists() or output.is_symlink()):  # before the work, and again after it
        raise OutputExistsError(f"{output} exists already; name another path or remove it")
    ranker = Ranker.open(bundle, options=BackendOptions(threads=threads), cache=cache)
    requests = read_requests(source, ranker.bundle.manifest.schema)[:limit]
    scored = []
    for index, request in enumerate(track(requests, "scoring", console=stderr(), disable=len(requests) < 20)):
        try:
            scores = ranker.rank(
                history=request.history, profile=request.profile, candidates=request.candidates, user=request.user
            )
        except DataError as error:
            raise DataError(f"{source}, request {request.request or index}: {error}") from error
        scored.append((request, scores))
    result = {"bundle": str(bundle), "model": ranker.bundle.manifest.name, "requests": [_plain(*s) for s in scored]}
    if output is not None:
        write_new_text(output, json.dumps(result) + "\n")
    if as_json:
        print_json(result)
    elif output is None:
        for index, (request, scores) in enumerate(scored):
            print_table(_table(request, scores, index, top))


def _plain(request: Request, scores: Scores) -> dict[str, Any]:
    return {
        "request": request.request,
        "user": request.user,
        "result": scores.result,
        "drift": scores.drift,
        "scores": {task: values.tolist() for task, values in scores.probabilities().items()},
        "logits": {task: values.tolist() for task, values in scores.logits.items()},
        "ranking": scores.ranking().tolist(),
        "milliseconds": {name: 1e3 * seconds for name, seconds in scores.seconds.items()},
    }


def _table(request: Request, scores: Scores, index: int, top: int) -> Table:
    probabilities = scores.probabilities()
    table = Table(title=f"request {request.request or index}", title_justify="left")
    for column in ("rank", "candidate", *probabilities):
        table.add_column(column, justify="right")
    for rank, candidate in enumerate(scores.ranking()[:top], start=1):
        table.add_row(str(rank), str(candidate), *(f"{values[candidate]:.4f}" for values in probabilities.values()))
    return table
