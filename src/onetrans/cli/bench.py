"""`onetrans bench`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.progress import Progress

from onetrans.bench.load import SPREADS, LoadConfig, check_bounds, file_requests, random_requests
from onetrans.bench.record import make_record, write_json
from onetrans.bench.report import latency_table
from onetrans.bench.run import REQUESTS, bench_ranker
from onetrans.bench.stats import LEAST_SAMPLES
from onetrans.cli.cache import cache_options
from onetrans.cli.console import print_json, print_table, stages, stderr
from onetrans.errors import ConfigError
from onetrans.parity.cases import read_cases
from onetrans.parity.verify import check, verify
from onetrans.runtime.backends.base import BackendOptions
from onetrans.runtime.cache.config import CacheConfig
from onetrans.runtime.ranker import Ranker

CANDIDATES = 100


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--requests", default=REQUESTS, show_default=True, help=f"To measure; at least {LEAST_SAMPLES}, better 200 or more."
)
@click.option("--candidates", type=int, help=f"Of each random request.  [default: {CANDIDATES}]")
@click.option("--events", type=int, help="Of each random history.  [default: the model's full history]")
@click.option("--spread", type=click.Choice(SPREADS), help="Sizes as stated, or uniform up to them.  [default: fixed]")
@click.option("--seed", type=int, help="Of the random requests.  [default: 0]")
@click.option(
    "--input", "source", type=click.Path(path_type=Path), help="Requests from a JSON file or a log folder instead."
)
@click.option("--threads", type=int, help="Of the backend.  [default: its own choice]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--record", type=click.Path(path_type=Path, dir_okay=False), help="Write raw samples and environment to this file."
)
@cache_options
def bench_command(
    bundle: Path,
    requests: int,
    candidates: int | None,
    events: int | None,
    spread: str | None,
    seed: int | None,
    source: Path | None,
    threads: int | None,
    as_json: bool,
    record: Path | None,
    cache: CacheConfig | None,
) -> None:
    """Measure p50, p95 and p99 of encode, prefill, append, decode and the whole request.

    The bundle is verified first: no speed comes from a bundle that is too far from gold.
    """
    if requests < LEAST_SAMPLES:
        raise ConfigError(f"--requests is {requests}; it must be at least {LEAST_SAMPLES}, better {REQUESTS} or more")
    if threads is not None and threads < 1:
        raise ConfigError(f"--threads is {threads}; it must be at least 1")
    given = {"--candidates": candidates, "--events": events, "--spread": spread, "--seed": seed}
    if source is not None and any(value is not None for value in given.values()):
        name = next(name for name, value in given.items() if value is not None)
        raise ConfigError(f"{name} shapes random requests, but --input {source} brings its own; drop one of them")
    if cache is not None and source is None:
        raise ConfigError("--state-memory keeps states of returning users, which random requests are not; give --input")
    ranker = Ranker.open(bundle, options=BackendOptions(threads=threads), cache=cache)
    manifest = ranker.bundle.manifest
    load = LoadConfig(
        events=manifest.pyramid.max_history if events is None else events,
        candidates=CANDIDATES if candidates is None else candidates,
        spread=spread or "fixed",
        seed=seed or 0,
    )
    if source is None:
        check_bounds(load, manifest)
        stream, shape = random_requests(load, manifest), vars(load)
    else:
        stream, shape = iter(file_requests(source, manifest)), dict.fromkeys(vars(load))
    with stages(f"verifying {bundle}") as progress:
        results = verify(ranker.backend, read_cases(ranker.bundle), progress)
    check(results)
    notes = []
    if requests < REQUESTS:
        notes.append(f"{requests} requests, fewer than {REQUESTS}: p95 and p99 are rough")
        stderr().print(f"note: {notes[0]}", markup=False)
    with _bar() as show:
        samples = bench_ranker(ranker, stream, count=requests, progress=show)
    notes += samples.notes
    made = make_record(
        manifest,
        samples,
        load={"requests": requests, "input": None if source is None else str(source), **shape},
        threads=threads,
        parity={"cases": len(results), "worst_relative_error": max(r.relative_error for r in results)},
        notes=tuple(notes),
    )
    if record is not None:
        write_json(record, made)
    if as_json:
        print_json({name: value for name, value in made.items() if name != "samples"})
    else:
        print_table(latency_table(made))


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal that is drawn between requests, and a line at the ends elsewhere."""
    console = stderr()
    if not console.is_terminal:

        def line(done: int, total: int) -> None:
            if done in (1, total):
                console.print(f"measuring: {done} of {total}", markup=False)

        yield line
        return
    # auto_refresh would draw from a thread of its own, into the measured time.
    with Progress(console=console, auto_refresh=False, transient=True) as progress:
        task: Any = progress.add_task("measuring")

        def bar(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, refresh=True)

        yield bar
