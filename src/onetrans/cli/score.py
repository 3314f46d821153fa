"""`onetrans score`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.progress import track
from rich.table import Table

from onetrans.cli.cache import cache_options
from onetrans.cli.console import bundle_json, print_json, print_table, stderr
from onetrans.cli.options import FROM_1, Verb, bundle_argument, device_option, file_option, json_option, threads_option
from onetrans.errors import OutputExistsError
from onetrans.features.requests import Request, read_requests
from onetrans.files import write_new_text
from onetrans.runtime.backends.base import BackendOptions
from onetrans.runtime.cache.config import CacheConfig
from onetrans.runtime.ranker import Ranker
from onetrans.runtime.scores import Scores


@click.command(
    "score",
    cls=Verb,
    examples=(
        "onetrans score bundle --input requests.json --top 5",
        "onetrans score bundle --input logs --limit 100 --output scores.json",
    ),
)
@bundle_argument
@click.option(
    "--input",
    "source",
    required=True,
    type=click.Path(path_type=Path),
    help="The requests: a JSON file, or a folder of Parquet logs.",
)
@file_option("--output", show_default="none", help="The JSON file to write the scores to; it must not exist yet.")
@click.option(
    "--top",
    type=FROM_1,
    default=10,
    show_default=True,
    help="The number of candidates that the table of a request shows.",
)
@click.option(
    "--limit", type=FROM_1, show_default="all", help="The number of requests to score, from the first one on."
)
@device_option
@threads_option
@json_option
@cache_options
def score_command(
    bundle: Path,
    source: Path,
    output: Path | None,
    top: int,
    limit: int | None,
    device: str | None,
    threads: int | None,
    as_json: bool,
    cache: CacheConfig | None,
) -> None:
    """Score requests with a bundle.

    BUNDLE is a folder that `onetrans export` wrote. With --state-memory the states of users are kept, so that a user
    who comes again is not prefilled again.
    """
    if output is not None and (output.exists() or output.is_symlink()):  # before the work, and again after it
        raise OutputExistsError(f"{output} exists already; name another path or remove it")
    ranker = Ranker.open(bundle, device=device, options=BackendOptions(threads=threads), cache=cache)
    requests = read_requests(source, ranker.bundle.manifest.schema)[:limit]
    shown = track(requests, "scoring", console=stderr(), disable=len(requests) < 20)
    scored = [(request, ranker.rank_batch([request])[0]) for request in shown]
    result = {"bundle": bundle_json(ranker.bundle), "requests": [_plain(*s) for s in scored]}
    if output is not None:
        write_new_text(output, json.dumps(result) + "\n")
    if as_json:
        print_json(result)
    elif output is None:
        for index, (request, scores) in enumerate(scored):
            print_table(_table(request, scores, index, top))
            count = len(scores.ranking())
            if count > top:
                click.echo(f"{top} of {count} candidates; --top {count} shows all")


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
