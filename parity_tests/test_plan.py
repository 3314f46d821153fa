"""The sizing model: its arrivals are what they say, its lookups are those of a real Ranker, its machines suffice."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onetrans.errors import ConfigError
from onetrans.runtime import Bundle, Ranker
from onetrans.runtime.backends.base import BackendOptions
from onetrans.runtime.cache.config import CacheConfig
from onetrans.runtime.manifest import Manifest
from onetrans.sizing.arrivals import Arrivals, Trace
from onetrans.sizing.costs import STATES, Costs, measure
from onetrans.sizing.plan import Replay, make_plan, replay
from parity_tests.conftest import Command, error_line, request_of

FEW = Arrivals(
    users=12, qps=0.03, events_mean=60, session_requests=3, request_events=0.7, return_events=4, context_seconds=60
)
MANY = Arrivals(users=20_000, qps=40, events_mean=80)
COSTS = Costs(prefill=12, append=3, decode=20)
GIVEN = ("--prefill-ms", 12, "--append-ms", 3, "--decode-ms", 20)


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    return Bundle.open(tiny_bundle).manifest


def states(manifest: Manifest, slots: int, **options: Any) -> CacheConfig:
    return CacheConfig(state_memory=slots * manifest.bytes_per_user, **options)


def shares(found: Replay) -> dict[str, float]:
    kinds = found.kinds[found.past :]
    return {kind: count / len(kinds) for kind, count in Counter(kinds).items()}


def rank_all(bundle: Path, trace: Trace, config: CacheConfig) -> tuple[Ranker, list[Any]]:
    """A real Ranker's results for a trace's requests, on the trace's clock."""
    ranker = Ranker.open(bundle, options=BackendOptions(threads=1), cache=config)
    schema = ranker.bundle.manifest.schema
    results = []
    most = {user: int(trace.tokens[trace.user == user].max()) for user in set(trace.user.tolist())}
    whole = {user: request_of(schema, events=most[user], candidates=2, seed=user) for user in most}
    columns = (trace.time, trace.user, trace.tokens, trace.context)
    for now, user, tokens, context in zip(*(column.tolist() for column in columns), strict=True):
        ranker.cache.clock = lambda now=now: now
        request = whole[user]
        assert isinstance(request.history, Mapping)
        results.append(
            ranker.rank(
                history={name: column[:tokens] for name, column in request.history.items()},
                profile={**request.profile, "days_active": float(context)},
                candidates=request.candidates,
                user=f"user {user}",
            )
        )
    ranker.check_integrity()
    return ranker, results


@pytest.mark.parametrize(
    ("slots", "ttl"),
    [
        (2, None),
        (8, None),
        (12, None),
        pytest.param(16, None, marks=pytest.mark.slow),
        pytest.param(12, 100.0, marks=pytest.mark.slow),
        (40, 400.0),
    ],
    ids=str,
)
def test_lookups_are_those_of_a_real_ranker(
    tiny_bundle: Path, manifest: Manifest, slots: int, ttl: float | None
) -> None:
    trace = FEW.draw(users=FEW.users, requests=400)
    config = states(manifest, slots, ttl=ttl)
    planned = replay(trace, manifest, config)
    ranker, results = rank_all(tiny_bundle, trace, config)
    assert planned.kinds == [scores.result for scores in results]
    assert set(planned.kinds) == {"reuse", "append", "prefill"}
    assert planned.renewed.tolist() == ["append" in scores.seconds for scores in results]
    appends = [index for index, kind in enumerate(planned.kinds) if kind == "append"]
    assert planned.computed[appends].tolist() == [results[index].fresh for index in appends]
    assert planned.cached == len(ranker.cache)
    counted = replay(dataclasses.replace(trace, time=trace.time - trace.time[0]), manifest, config)  # nothing is past
    assert counted.past == 0
    assert counted.counts == ranker.cache.counts
    assert (counted.counts["evicted"] > 20) == (slots < 16)
    assert (counted.counts["expired"] > 20) == (ttl is not None)


@pytest.mark.slow
def test_a_bundle_that_cannot_append_prefills_or_reuses(intent_bundle: Path) -> None:
    manifest = Bundle.open(intent_bundle).manifest
    trace = FEW.draw(users=FEW.users, requests=200)
    config = states(manifest, 16)
    planned = replay(trace, manifest, config)
    _, results = rank_all(intent_bundle, trace, config)
    assert planned.kinds == [scores.result for scores in results]
    assert set(planned.kinds) == {"reuse", "prefill"}
    assert not planned.renewed.any()


def test_the_same_seed_gives_the_same_trace(manifest: Manifest) -> None:
    first, again = (MANY.draw(users=500, requests=2000) for _ in range(2))
    other = dataclasses.replace(MANY, seed=1).draw(users=500, requests=2000)
    for name, column in vars(first).items():
        np.testing.assert_array_equal(column, vars(again)[name])
        assert not np.array_equal(column, vars(other)[name])
    config = states(manifest, 100)
    assert replay(first, manifest, config).kinds == replay(again, manifest, config).kinds
    plans = [make_plan(manifest, MANY, config, COSTS, requests=2000, utilisation=0.6) for _ in range(2)]
    assert plans[0] == plans[1]


def test_more_memory_never_turns_a_hit_into_a_prefill(manifest: Manifest) -> None:
    trace = MANY.draw(users=1000, requests=5000)
    found = [replay(trace, manifest, states(manifest, slots)) for slots in (2, 8, 50, 200, 500, 2000)]
    for less, more in itertools.pairwise(found):
        assert all(b != "prefill" or a == "prefill" for a, b in zip(less.kinds, more.kinds, strict=True))
    hits = [1 - shares(one)["prefill"] for one in found]
    assert hits == sorted(hits)
    assert hits[0] < 0.2
    assert hits[-1] > 0.9


def test_the_past_leaves_the_cache_as_a_long_run_does(manifest: Manifest) -> None:
    trace = MANY.draw(users=2000, requests=20_000)
    config = states(manifest, 208)
    warm, cold = replay(trace, manifest, config), replay(trace.part(slice(trace.past, None)), manifest, config)
    kinds = warm.kinds[warm.past :]
    assert kinds[:1000] != cold.kinds[:1000]
    assert kinds[5000:] == cold.kinds[5000:]
    # Only as much of the past counts as the cache holds.
    fewer = trace.part(slice(trace.past - 200, None))
    assert replay(fewer, manifest, config).kinds[200:] == kinds
    early, late = (Counter(part) for part in (kinds[:5000], kinds[-5000:]))
    assert all(abs(early[kind] - late[kind]) < 250 for kind in early)


def test_arrivals_are_what_they_say() -> None:
    trace = MANY.draw(users=MANY.users, requests=100_000)
    after = slice(trace.past, None)
    assert trace.past == MANY.users
    assert np.all(np.diff(trace.time) >= 0)
    assert len(trace.time[after]) / trace.time[-1] == pytest.approx(MANY.qps, rel=0.02)
    assert np.mean(trace.tokens[: trace.past]) == pytest.approx(MANY.events_mean, rel=0.03)
    for user in (0, 7, 1000):  # histories grow by what is new
        own = trace.user == user
        np.testing.assert_array_equal(np.diff(trace.tokens[own]), trace.fresh[own][1:])
    # A fifth makes seven tenths where users ask seldom; where they ask as fast as pages are read, all are alike.
    for gap, share in ((20_000, 0.72), (500, 0.58), (31, 0.2)):
        load = dataclasses.replace(MANY, qps=MANY.users / gap)
        per_user = np.bincount(load.draw(users=MANY.users, requests=400_000).user, minlength=MANY.users) - 1
        assert per_user[: MANY.users // 5].sum() / per_user.sum() == pytest.approx(share, abs=0.02)
    # Of a machine's share of the users, the same rate per user; the busiest ones, few, are drawn or not.
    fewer = MANY.draw(users=2000, requests=10_000)
    assert (len(fewer.time) - fewer.past) / fewer.time[-1] == pytest.approx(MANY.qps / 10, rel=0.05)


def test_gaps_and_events_have_the_means_stated() -> None:
    one = Arrivals(users=1, qps=0.01, events_mean=0, request_events=0.5, return_events=3, session_requests=4)
    assert one.return_gap(1) == pytest.approx(4 * 100 - 3 * 30)  # 4 requests in 400 s
    trace = one.draw(users=1, requests=40_000)
    assert np.diff(trace.time).mean() == pytest.approx(100, rel=0.03)
    assert trace.fresh[1:].mean() == pytest.approx(0.75 * 0.5 + 0.25 * 3, rel=0.03)


@pytest.mark.parametrize("slots", [20, 2000])
def test_machines_are_the_fewest_that_suffice(manifest: Manifest, slots: int) -> None:
    load = Arrivals(users=20_000, qps=400, events_mean=80)
    config = states(manifest, slots)
    plan = make_plan(manifest, load, config, COSTS, requests=5000, utilisation=0.6)

    def utilisation(machines: int) -> float:
        trace = load.draw(users=round(load.users / machines), requests=5000)
        found = replay(trace, manifest, config)
        kinds = found.kinds[found.past :]
        renewed = found.renewed[found.past :].mean()
        milliseconds = 20 + 12 * kinds.count("prefill") / len(kinds) + 3 * renewed
        return float(load.qps / machines * milliseconds / 1000)

    assert utilisation(plan.machines) == pytest.approx(plan.at.utilisation)
    assert plan.at.utilisation <= 0.6 < utilisation(plan.machines - 1)
    assert sum(plan.at.shares.values()) == pytest.approx(1)
    assert plan.half is not None
    assert plan.half.shares["prefill"] >= plan.at.shares["prefill"] >= plan.double.shares["prefill"]
    assert plan.limit == {20: "memory", 2000: "compute"}[slots]
    assert plan.unlimited.evicted == 0
    assert plan.unlimited.cached == plan.users_per_machine
    everyone = replay(load.draw(users=plan.users_per_machine, requests=5000), manifest, states(manifest, 30_000))
    assert shares(everyone) == {kind: share for kind, share in plan.unlimited.shares.items() if share}
    assert plan.at.bytes_cached == plan.at.cached * manifest.bytes_per_user <= config.state_memory


def test_costs_are_measured_at_the_traces_lengths(tiny_bundle: Path, manifest: Manifest) -> None:
    ranker = Ranker.open(tiny_bundle, options=BackendOptions(threads=1), cache=states(manifest, STATES))
    stages: list[str] = []
    trace = MANY.draw(users=500, requests=500)
    costs = measure(ranker, trace, candidates=8, progress=stages.append)
    assert all(0 < milliseconds < 1000 for milliseconds in vars(costs).values())
    assert [stage.split()[1] for stage in stages] == ["prefill"] * 5 + ["append"] * 5
    assert f"{np.percentile(trace.tokens, 50, method='nearest')} events" in stages[2]
    with pytest.raises(ConfigError, match="candidates is 5000; this bundle takes 1 to 2048"):
        measure(ranker, trace, candidates=5000)


ASKED: tuple[Any, ...] = ("--users", 20_000, "--qps", 40, "--state-memory", "100MiB", "--requests", 2000)
BASE = (*ASKED, *GIVEN)


def test_as_json_without_a_backend(tiny_bundle: Path, manifest: Manifest) -> None:
    arguments = ["plan", tiny_bundle, *ASKED, *GIVEN, "--json"]
    code = (
        "import sys; sys.modules['onnxruntime'] = None; from onetrans.cli.main import cli, run;"
        " status = run(cli, sys.argv[1:]); sys.exit(status or 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    config = CacheConfig(state_memory=100 << 20)
    load = dataclasses.replace(MANY, events_mean=manifest.pyramid.max_history)
    plan = make_plan(manifest, load, config, COSTS, requests=2000, utilisation=0.6)
    expected = dataclasses.asdict(plan)
    assert found.pop("bundle")["path"] == str(tiny_bundle)
    assert found == {
        **json.loads(json.dumps(expected)),
        "measured": [],
        "utilisation": 0.6,
        "ttl": None,
        "arrivals": dataclasses.asdict(load),
    }
    assert "planning: replaying one of " in done.stderr


def test_as_a_table_with_measured_costs(run_here: Command, tiny_bundle: Path) -> None:
    done = run_here("plan", tiny_bundle, *ASKED, "--candidates", 8, "--threads", 1, "--decode-ms", 20)
    assert done.returncode == 0, done.stderr
    for text in (
        "machines needed: ",
        "100.00 MiB",
        "asked",
        "50.00 MiB",
        "all fit",
        "200.00 MiB",
        "limit: ",
        "decode 20 ms",
    ):
        assert text in done.stdout
    assert "planning: measuring prefill 1 of 5: " in done.stderr


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"--users": 0}, "users is 0; it must be 1 to 1e+12"),
        ({"--users": "many"}, "'--users': 'many' is not a valid integer"),
        ({"--qps": 0}, "qps is 0.0; it must be 1e-06 to 1e+09"),
        ({"--qps": "nan"}, "qps is nan; it must be"),
        ({"--qps": 900}, "qps is 900, but 20000 users make fewer than 666.7 requests per second, one every 30 s each"),
        ({"--users": 10**9}, "users of one machine are too many to replay"),
        (
            {"--state-memory": "200kB"},
            "state memory of 200000 bytes holds 1 users of 114192 bytes; give at least 228384",
        ),
        ({"--state-memory": 0}, "--state-memory is 0, which keeps no state"),
        ({"--state-memory": "4 potatoes"}, "'4 potatoes' is not a size"),
        ({"--utilisation": 1.5}, "--utilisation is 1.5; it must be above 0 and at most 1"),
        ({"--utilisation": "nan"}, "utilisation is nan; it must be above 0 and at most 1"),
        ({"--ttl": 0}, "--ttl is 0.0; it must be above 0"),
        ({"--ttl": "nan"}, "--ttl is nan; it must be above 0"),
        ({"--prefill-ms": -1}, "--prefill-ms is -1.0; it must be above 0"),
        ({"--decode-ms": "inf"}, "decode takes inf ms; give milliseconds above 0"),
        ({"--requests": 10}, "--requests is 10; it must be 1,000 to 10,000,000"),
        ({"--zipf": 9}, "zipf is 9.0; it must be 0 to 4"),
        ({"--session-requests": 0.5}, "--session-requests is 0.5; it must be 1 to 1,000,000"),
        ({"--events-mean": -1}, "--events-mean is -1.0; it must be 0 to 1,000,000"),
        ({"--seed": -1}, "seed is -1; it must be 0 to"),
        ({"--candidates": 5}, "--candidates and --threads shape what is measured, but all three costs are given"),
    ],
    ids=lambda value: " ".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_what_is_wrong_gets_one_line(
    run_here: Command, tiny_bundle: Path, changes: dict[str, object], expected: str
) -> None:
    options = dict(zip(BASE[::2], BASE[1::2], strict=True)) | changes
    assert expected in error_line(run_here("plan", tiny_bundle, *itertools.chain(*options.items())), 2)
