"""`onetrans plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from onetrans.cli.cache import SIZE
from onetrans.cli.console import bundle_json, print_json, print_table, stages
from onetrans.cli.options import (
    ABOVE_0,
    FROM_1,
    Real,
    Verb,
    Whole,
    bundle_argument,
    device_option,
    json_option,
    threads_option,
    typed_options,
)
from onetrans.errors import ConfigError
from onetrans.runtime.backends.base import BackendOptions
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.cache.config import CacheConfig
from onetrans.runtime.ranker import Ranker
from onetrans.runtime.targets import open_backend
from onetrans.sizing.arrivals import BOUNDS, Arrivals
from onetrans.sizing.costs import CANDIDATES, STATES, Costs, measure
from onetrans.sizing.plan import LEAST_REQUESTS, MOST_REQUESTS, REQUESTS, Machine, Plan, make_plan

SAMPLE = 1000  # users, and about as many requests, of whose histories a few are measured


def _bounded(name: str) -> Whole | Real:
    """The type of an option for a field of Arrivals, with that field's bounds."""
    low, high = BOUNDS[name]
    return Whole(int(low), int(high)) if name in ("users", "seed") else Real(low, high)


def _model(name: str, text: str) -> Callable[[Any], Any]:
    """An option for a field of Arrivals, with that field's default and bounds."""
    return click.option(
        f"--{name.replace('_', '-')}",
        type=_bounded(name),
        default=getattr(Arrivals, name),
        show_default=True,
        help=text,
    )


@click.command(
    "plan",
    cls=Verb,
    examples=(
        "onetrans plan bundle --users 1000000 --qps 200 --state-memory 4GiB",
        "onetrans plan bundle --users 1000000 --qps 200 --state-memory 4GiB"
        " --prefill-ms 90 --append-ms 8 --decode-ms 150",
    ),
)
@bundle_argument
@click.option("--users", type=_bounded("users"), required=True, help="The number of users that make the requests.")
@click.option(
    "--qps", type=_bounded("qps"), required=True, help="The requests per second that all users make together."
)
@click.option(
    "--state-memory",
    type=SIZE,
    required=True,
    help="The memory for states on one machine, such as 4GiB or 500MB; it must hold at least two states.",
)
@click.option(
    "--utilisation",
    type=Real(0, 1, min_open=True),
    default=0.6,
    show_default=True,
    help="The share of its time that a machine may work.",
)
@click.option(
    "--ttl", type=ABOVE_0, show_default="no limit", help="The seconds after which a state is prefilled again."
)
@click.option(
    "--prefill-ms", type=ABOVE_0, show_default="measured here", help="The milliseconds of a prefill, as a mean."
)
@click.option(
    "--append-ms", type=ABOVE_0, show_default="measured here", help="The milliseconds of an append, as a mean."
)
@click.option(
    "--decode-ms",
    type=ABOVE_0,
    show_default="measured here",
    help="The milliseconds of a request beside its prefill or append, as a mean: encoding, lookup and decode.",
)
@click.option(
    "--candidates",
    type=FROM_1,
    default=CANDIDATES,
    show_default=True,
    help="The number of candidates in each request that is measured.",
)
@device_option
@threads_option
@click.option(
    "--events-mean",
    type=_bounded("events_mean"),
    show_default="the model's full history",
    help="The mean number of events in a history at the start; lengths are exponential.",
)
@_model(
    "zipf",
    "The exponent of the users' return gaps: at 0.86 a fifth of the users makes some seven tenths of the requests, at 0"
    " all are alike.",
)
@_model("session_requests", "The mean number of requests in a session, such as the pages of a feed; geometric.")
@_model("request_gap", "The mean seconds between two requests of a session; exponential.")
@_model("request_events", "The mean number of new events between two requests of a session; Poisson.")
@_model("return_events", "The mean number of new events between two sessions, such as those of a search; Poisson.")
@_model(
    "context_seconds",
    "The seconds for which a user's profile and context stay the same; the context of the presets is the hour.",
)
@click.option(
    "--requests",
    type=Whole(LEAST_REQUESTS, MOST_REQUESTS),
    default=REQUESTS,
    show_default=True,
    help="The number of requests to replay for one machine, beside those that fill its cache.",
)
@_model("seed", "The seed of the simulated load, a whole number.")
@json_option
def plan_command(
    bundle: Path,
    state_memory: int,
    utilisation: float,
    ttl: float | None,
    prefill_ms: float | None,
    append_ms: float | None,
    decode_ms: float | None,
    candidates: int,
    device: str | None,
    threads: int | None,
    events_mean: float | None,
    requests: int,
    as_json: bool,
    **model: Any,
) -> None:
    """Say how many machines a load needs, and what limits them.

    BUNDLE is a folder that `onetrans export` wrote. Simulated requests of returning users are replayed against the
    cache policy of the runtime. One machine is one process that ranks one request after another; users are hashed to
    machines.

    Machines needed: qps × ms per request / 1000 / utilisation, rounded up. Ms per request: decode, plus prefill × the
    share of prefills, plus append × the share of appends and of reuses with another profile or context.

    Where all of --prefill-ms, --append-ms and --decode-ms are given, nothing is measured. The model of the load is told
    in docs/sizing.md.
    """
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    mean = manifest.pyramid.max_history if events_mean is None else events_mean
    arrivals = Arrivals(events_mean=mean, **model)
    config = CacheConfig(state_memory=state_memory, ttl=ttl)
    if not state_memory:
        raise ConfigError("--state-memory is 0, which keeps no state; give that of two users or more")
    config.slots(manifest.bytes_per_user)  # refuses too little memory before anything is measured
    given = {"prefill": prefill_ms, "append": append_ms, "decode": decode_ms}
    costs = {part: milliseconds for part, milliseconds in given.items() if milliseconds is not None}
    measured = [part for part in given if part not in costs]
    if not measured and typed_options("candidates", "threads"):
        raise ConfigError("--candidates and --threads shape what is measured, but all three costs are given; drop them")
    with stages("planning") as progress:
        if measured:
            cache = CacheConfig(state_memory=STATES * manifest.bytes_per_user)
            ranker = Ranker(opened, open_backend(opened, device, BackendOptions(threads=threads)), cache)
            sample = arrivals.draw(users=min(arrivals.users, SAMPLE), requests=SAMPLE)
            found = measure(ranker, sample, candidates=candidates, progress=progress)
            costs = {**dataclasses.asdict(found), **costs}
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
        print_json({"bundle": bundle_json(opened), **dataclasses.asdict(plan), **stated})
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
