"""`onetrans plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from onetrans.cli.console import print_json, print_table, stages
from onetrans.errors import ConfigError
from onetrans.runtime.backends.base import BackendOptions
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.cache.config import CacheConfig, parse_bytes
from onetrans.runtime.ranker import Ranker
from onetrans.runtime.targets import open_backend
from onetrans.sizing.arrivals import Arrivals
from onetrans.sizing.costs import CANDIDATES, STATES, Costs, measure
from onetrans.sizing.plan import LEAST_REQUESTS, MOST_REQUESTS, REQUESTS, Machine, Plan, make_plan

SAMPLE = 1000  # users, and about as many requests, of whose histories a few are measured
POSITIVE = click.IntRange(min=1)
ABOVE_0 = click.FloatRange(min=0, min_open=True)
SHARE = click.FloatRange(min=0, max=1, min_open=True)


def _model(name: str, text: str) -> Callable[[Any], Any]:
    """An option for a field of Arrivals, with that field's default."""
    default = getattr(Arrivals, name)
    return click.option(f"--{name.replace('_', '-')}", default=default, show_default=True, help=text)


@click.command("plan")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--users", type=int, required=True, help="Among whom the requests spread.")
@click.option("--qps", type=float, required=True, help="Requests per second of all users.")
@click.option("--state-memory", required=True, help="For the states of one machine, as 4GiB.")
@click.option(
    "--utilisation", type=SHARE, default=0.6, show_default=True, help="Share of its time that a machine may work."
)
@click.option("--ttl", type=ABOVE_0, help="Seconds after which a state is prefilled again.  [default: no limit]")
@click.option("--prefill-ms", type=ABOVE_0, help="Mean of a prefill.  [default: measured here]")
@click.option("--append-ms", type=ABOVE_0, help="Mean of an append.  [default: measured here]")
@click.option("--decode-ms", type=ABOVE_0, help="Of every request: encoding and decode.  [default: measured here]")
@click.option("--candidates", type=int, help=f"Of each request that is measured.  [default: {CANDIDATES}]")
@click.option("--threads", type=POSITIVE, help="Of the backend that is measured.  [default: its own choice]")
@click.option(
    "--events-mean",
    type=float,
    help="Of the histories' lengths at the start, which are exponential.  [default: the model's full history]",
)
@_model(
    "zipf", "Exponent of the users' return gaps; 0.86: a fifth makes some seven tenths of the requests, 0: all alike."
)
@_model("session_requests", "Mean requests of a session, geometric; a feed read for some pages.")
@_model("request_gap", "Mean seconds between them, exponential; a page is looked at.")
@_model("request_events", "Mean new events in between, Poisson; every second page is acted upon.")
@_model("return_events", "Mean new events between sessions, Poisson; made elsewhere, as in search.")
@_model("context_seconds", "How long a profile and context stand still; the presets' context is the hour.")
@click.option(
    "--requests",
    type=click.IntRange(LEAST_REQUESTS, MOST_REQUESTS),
    default=REQUESTS,
    show_default=True,
    help="To replay for one machine, beside the past that fills its cache.",
)
@_model("seed", "Of all that is drawn.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan_command(
    bundle: Path,
    state_memory: str,
    utilisation: float,
    ttl: float | None,
    prefill_ms: float | None,
    append_ms: float | None,
    decode_ms: float | None,
    candidates: int | None,
    threads: int | None,
    events_mean: float | None,
    requests: int,
    as_json: bool,
    **model: Any,
) -> None:
    """Say how many machines a load needs, and what limits them.

    A model of returning users is replayed against the cache policy of the runtime. One machine is one process that
    ranks one request after another; users are hashed to machines.

    Machines needed: qps × ms per request / 1000 / utilisation, rounded up. Ms per request: decode, plus prefill × the
    share of prefills, plus append × the share of appends and of reuses with another profile or context.

    With the three costs given no backend is needed. The model is told in docs/sizing.md.
    """
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    mean = manifest.pyramid.max_history if events_mean is None else events_mean
    arrivals = Arrivals(events_mean=mean, **model)
    config = CacheConfig(state_memory=parse_bytes(state_memory), ttl=ttl)
    if not config.state_memory:
        raise ConfigError(f"--state-memory is {state_memory}, which keeps no state; give that of two users or more")
    config.slots(manifest.bytes_per_user)  # refuses too little memory before anything is measured
    given = {"prefill": prefill_ms, "append": append_ms, "decode": decode_ms}
    costs = {part: milliseconds for part, milliseconds in given.items() if milliseconds is not None}
    measured = [part for part in given if part not in costs]
    if not measured and (candidates is not None or threads is not None):
        raise ConfigError("--candidates and --threads shape what is measured, but all three costs are given; drop them")
    with stages("planning") as progress:
        if measured:
            cache = CacheConfig(state_memory=STATES * manifest.bytes_per_user)
            ranker = Ranker(opened, open_backend(opened, options=BackendOptions(threads=threads)), cache)
            sample = arrivals.draw(users=min(arrivals.users, SAMPLE), requests=SAMPLE)
            count = CANDIDATES if candidates is None else candidates
            costs = {**dataclasses.asdict(measure(ranker, sample, candidates=count, progress=progress)), **costs}
        plan = make_plan(
            manifest, arrivals, config, Costs(**costs), requests=requests, utilisation=utilisation, progress=progress
        )
    if as_json:
        stated = {
            "measured": measured,
            "utilisation": utilisation,
            "ttl": ttl,
            "arrivals": dataclasses.asdict(arrivals),
        }
        print_json({"bundle": str(bundle), "model": manifest.name, **dataclasses.asdict(plan), **stated})
        return
    click.echo(
        f"machines needed: {plan.machines:,} = ceil({arrivals.qps:g}/s × {plan.at.milliseconds:.4g} ms"
        f" / 1000 / {utilisation:g})"
    )
    print_table(_table(plan))
    for line in _notes(plan, arrivals, measured):
        click.echo(line)


def _table(plan: Plan) -> Table:
    columns = [machine for machine in (plan.half, plan.at, plan.double, plan.unlimited) if machine is not None]
    title = f"one of {plan.machines:,} machines, {plan.users_per_machine:,} users each"
    table = Table("", title=title, title_justify="left")
    for machine in columns:
        note = "\nasked" if machine is plan.at else "\nall fit" if machine is plan.unlimited else ""
        table.add_column(_size(machine.state_memory) + note, justify="right")

    def row(name: str, show: Callable[[Machine], str]) -> None:
        table.add_row(name, *(show(machine) for machine in columns))

    row("users that fit", lambda m: f"{m.capacity:,}")
    row("users cached", lambda m: f"{m.cached:,}")
    row("bytes cached", lambda m: _size(m.bytes_cached))
    row("reuse", lambda m: f"{m.shares['reuse']:.1%}")
    row("append", lambda m: f"{m.shares['append']:.1%}")
    row("prefill", lambda m: f"{m.shares['prefill']:.1%}")
    row("append run, also for another context", lambda m: f"{m.renewed:.1%}")
    row("states evicted", lambda m: f"{m.evicted:.1%}")
    row("states expired", lambda m: f"{m.expired:.1%}")
    row("events computed per request", lambda m: f"{m.events:.1f}")
    row("ms per request", lambda m: f"{m.milliseconds:.4g}")
    row("utilisation", lambda m: f"{m.utilisation:.1%}")
    table.caption = f"shares of {plan.at.requests:,} requests; utilisation is of time"
    return table


def _notes(plan: Plan, arrivals: Arrivals, measured: list[str]) -> list[str]:
    costs = (f"{p} {ms:.4g} ms{' (measured)' * (p in measured)}" for p, ms in vars(plan.costs).items())
    gaps = {"busiest": 1, "median": (arrivals.users + 1) // 2, "rarest": arrivals.users}
    shown = (f"{_duration(arrivals.return_gap(rank))} of the {user} user" for user, rank in gaps.items())
    return [
        f"limit: {plan.limit}; memory for all users would save {plan.saving:.1%} of a machine's time",
        f"state: {plan.bytes_per_user:,} bytes per user",
        f"costs: {', '.join(costs)}",
        f"mean gap between sessions: {', '.join(shown)}",
    ]


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
