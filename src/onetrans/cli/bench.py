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
from onetrans.cli.console import bundle_json, print_json, print_table, stages, stderr
from onetrans.cli.options import (
    FROM_0,
    FROM_1,
    Choice,
    Verb,
    Whole,
    bundle_argument,
    device_option,
    file_option,
    json_option,
    threads_option,
    typed_options,
)
from onetrans.errors import ConfigError
from onetrans.parity.cases import read_cases
from onetrans.parity.verify import check, verify
from onetrans.runtime.backends.base import BackendOptions
from onetrans.runtime.cache.config import CacheConfig
from onetrans.runtime.ranker import Ranker

CANDIDATES = 100
SHAPE = ("candidates", "events", "spread", "seed")  # options that shape random requests


@click.command(
    "bench",
    cls=Verb,
    examples=(
        "onetrans bench bundle --candidates 100 --threads 2",
        "onetrans bench bundle --input requests.json --state-memory 1GiB --record record.json",
    ),
)
@bundle_argument
@click.option(
    "--requests",
    type=Whole(min=LEAST_SAMPLES),
    default=REQUESTS,
    show_default=True,
    help=f"The number of requests to measure; fewer than {REQUESTS} give rough p95 and p99.",
)
@click.option(
    "--candidates",
    type=FROM_1,
    default=CANDIDATES,
    show_default=True,
    help="The number of candidates in each random request.",
)
@click.option(
    "--events",
    type=FROM_0,
    show_default="the model's full history",
    help="The number of events in each random history.",
)
@click.option(
    "--spread",
    type=Choice(SPREADS),
    default=SPREADS[0],
    show_default=True,
    help="The sizes of random requests: fixed at --events and --candidates, or uniform up to them.",
)
@click.option(
    "--seed", type=FROM_0, default=0, show_default=True, help="The seed of the random requests, a whole number."
)
@click.option(
    "--input",
    "source",
    type=click.Path(path_type=Path),
    show_default="random requests",
    help="The requests: a JSON file, or a folder of Parquet logs.",
)
@device_option
@threads_option
@json_option
@file_option(
    "--record",
    show_default="none",
    help="The JSON file to write raw samples and the environment to; an older one there is replaced.",
)
@cache_options
def bench_command(
    bundle: Path,
    requests: int,
    candidates: int,
    events: int | None,
    spread: str,
    seed: int,
    source: Path | None,
    device: str | None,
    threads: int | None,
    as_json: bool,
    record: Path | None,
    cache: CacheConfig | None,
) -> None:
    """Measure the latency of a bundle.

    BUNDLE is a folder that `onetrans export` wrote. Shown are p50, p95 and p99 of encode, prefill, append, decode and
    the whole request. The bundle is verified first: no latency is reported where its scores are wrong.
    """
    if source is not None:
        for name in typed_options(*SHAPE):
            raise ConfigError(f"{name} shapes random requests, but --input {source} brings its own; drop one of them")
    if cache is not None and source is None:
        raise ConfigError("--state-memory keeps states of returning users, which random requests are not; give --input")
    ranker = Ranker.open(bundle, device=device, options=BackendOptions(threads=threads), cache=cache)
    manifest = ranker.bundle.manifest
    load = LoadConfig(
        events=manifest.pyramid.max_history if events is None else events,
        candidates=candidates,
        spread=spread,
        seed=seed,
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
        shown = {name: value for name, value in made.items() if name != "samples"}
        print_json({**shown, "bundle": {**made["bundle"], **bundle_json(ranker.bundle)}})
    else:
        print_table(latency_table(made))


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """Shows a bar on a terminal, drawn between requests, and a line at the ends elsewhere."""
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
