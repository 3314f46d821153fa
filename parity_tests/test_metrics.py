"""What a Ranker did, as Prometheus reads it; and nothing of it where nobody asks."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from onetrans.errors import DataError, MissingDependencyError
from onetrans.features.requests import Request
from onetrans.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from onetrans.runtime.metrics import Metrics
from parity_tests.states import cached, people, rank, upto

KINDS = ("reuse", "append", "prefill", "stale")
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope="module")
def lives(backend: OnnxRuntimeCpu) -> dict[str, Request]:
    return people(backend.manifest.schema, "abcdefgh", candidates=20)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def scrape(registry: CollectorRegistry) -> Samples:
    """What a Prometheus server would read."""
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert all(family.name.startswith("onetrans_") for family in families)
    assert all(family.documentation and family.type in ("counter", "gauge", "histogram") for family in families)
    assert len({family.name for family in families}) == len(families)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((f"onetrans_{name}", tuple(sorted(labels.items()))), 0.0)


def requests_of(samples: Samples) -> dict[str, float]:
    return {kind: value(samples, "requests_total", result=kind) for kind in KINDS}


def components_of(samples: Samples) -> dict[str, float]:
    return {
        dict(labels)["component"]: count
        for (name, labels), count in samples.items()
        if name == "onetrans_component_seconds_count"
    }


def test_all_stands_at_zero_before_the_first_request(backend: OnnxRuntimeCpu, registry: CollectorRegistry) -> None:
    _, pool = cached(backend.bundle, backend, slots=12, metrics=Metrics(registry))
    samples = scrape(registry)
    assert requests_of(samples) == dict.fromkeys(KINDS, 0.0)
    assert ("onetrans_requests_total", (("result", "stale"),)) in samples
    for reason in ("evicted", "expired", "invalidated", "turned_away"):
        assert samples["onetrans_states_gone_total", (("reason", reason),)] == 0
    assert samples["onetrans_states", ()] == samples["onetrans_state_bytes", ()] == 0
    assert samples["onetrans_state_bytes_limit", ()] == pool.nbytes


def test_counters_are_what_happened(
    backend: OnnxRuntimeCpu, registry: CollectorRegistry, lives: dict[str, Request]
) -> None:
    """Counted here from the results, over growing, evicted, invalidated and expired users, alone and in batches."""
    one = backend.manifest.bytes_per_user
    ranker, _ = cached(backend.bundle, backend, slots=8, ttl=50.0, metrics=Metrics(registry))
    now = [0.0]
    ranker.cache.clock = lambda: now[0]
    rng = np.random.default_rng(0)
    kinds: Counter[str] = Counter()
    components: Counter[str] = Counter()
    candidates = events = 0
    seconds = 0.0
    at = dict.fromkeys(lives, 10)
    for step in range(120):
        now[0] += 1.0
        if step % 40 == 39:
            now[0] += 60.0
        if step % 17 == 0:
            ranker.invalidate("a")
        chosen = rng.permutation(list(lives))[: rng.integers(1, 5)].tolist()
        for user in chosen:
            at[user] += int(rng.integers(0, 5))
        batch = [upto(lives[user], at[user], int(rng.integers(1, 20))) for user in chosen]
        found = ranker.rank_batch(batch)
        for first in range(0, len(batch), ranker.cache.compute_slots):  # the users of a pass share their times
            components.update(found[first].seconds.keys() - ({"encode"} if first else set()))  # of all, once
            seconds += found[first].seconds["decode"]
        for scores in found:
            kinds[scores.result] += 1
            candidates += len(scores.logits["ctr"])
            events += scores.fresh
    samples = scrape(registry)
    assert requests_of(samples) == {kind: kinds[kind] for kind in KINDS}
    assert min(kinds[kind] for kind in ("reuse", "append", "prefill")) > 10
    assert value(samples, "candidates_total") == candidates
    assert value(samples, "events_total") == events
    assert components_of(samples) == components
    assert components.keys() == {"encode", "prefill", "append", "decode"}
    assert value(samples, "component_seconds_sum", component="decode") == pytest.approx(
        seconds, rel=1e-9
    )  # of adding up
    for reason, least in (("evicted", 10), ("expired", 1), ("invalidated", 3), ("turned_away", 0)):
        assert value(samples, "states_gone_total", reason=reason) == ranker.cache.counts[reason] >= least
    assert value(samples, "states") == len(ranker.cache) > 0
    assert value(samples, "state_bytes") == len(ranker.cache) * one
    assert value(samples, "drift_count") == 0


def test_a_state_that_finds_no_room_is_counted(
    backend: OnnxRuntimeCpu, registry: CollectorRegistry, lives: dict[str, Request]
) -> None:
    ranker, _ = cached(backend.bundle, backend, slots=2, metrics=Metrics(registry))
    rank(ranker, upto(lives["a"], 10))
    (key,) = ranker.cache.entries()
    with ranker.cache.use([key]):
        assert rank(ranker, upto(lives["b"], 10)).result == "prefill"
    samples = scrape(registry)
    assert value(samples, "states_gone_total", reason="turned_away") == 1
    assert list(ranker.cache.entries()) == [key]


def test_drift_is_observed_where_it_was_measured(
    backend: OnnxRuntimeCpu, registry: CollectorRegistry, lives: dict[str, Request]
) -> None:
    metrics = Metrics(registry)
    ranker, _ = cached(backend.bundle, backend, slots=16, reuse="stale", drift_every=2, metrics=metrics)
    drifts = []
    for user in "abcd":
        rank(ranker, upto(lives[user], 100))
        scores = rank(ranker, upto(lives[user], 130))
        assert scores.result == "stale"
        drifts += [scores.drift] if scores.drift is not None else []
    samples = scrape(registry)
    assert requests_of(samples) == {"reuse": 0, "append": 0, "prefill": 4, "stale": 4}
    assert value(samples, "drift_count") == len(drifts) == 2
    assert value(samples, "drift_sum") == sum(drifts) > 0
    assert value(samples, "drift_bucket", le="1.0") == 2
    assert value(samples, "drift_bucket", le="1e-06") == 0
    assert components_of(samples)["drift"] == 2
    assert value(samples, "events_total") == 4 * 100 + 4 * 30


def test_a_refused_request_counts_nowhere(
    backend: OnnxRuntimeCpu, registry: CollectorRegistry, lives: dict[str, Request]
) -> None:
    ranker, _ = cached(backend.bundle, backend, slots=8, metrics=Metrics(registry))
    with pytest.raises(DataError):
        ranker.rank_batch([upto(lives["a"], 10), upto(lives["a"], 10)])
    samples = scrape(registry)
    assert requests_of(samples) == dict.fromkeys(KINDS, 0.0)
    assert value(samples, "candidates_total") == 0


def test_two_rankers_have_a_registry_each(backend: OnnxRuntimeCpu, lives: dict[str, Request]) -> None:
    registries = [CollectorRegistry(), CollectorRegistry()]
    rankers = [cached(backend.bundle, backend, slots=8, metrics=Metrics(registry))[0] for registry in registries]
    rank(rankers[0], upto(lives["a"], 10))
    assert [value(scrape(registry), "requests_total", result="prefill") for registry in registries] == [1, 0]


ASKED = """
import sys
from pathlib import Path
from onetrans.features.random_requests import random_request
from onetrans.runtime.backends.base import BackendOptions
from onetrans.runtime import Ranker
from onetrans.runtime.cache.config import CacheConfig
from onetrans.runtime.metrics import Metrics
import numpy as np

asked = sys.argv[2] == "asked"
metrics = Metrics() if asked else None
cache = CacheConfig(state_memory=10**7)
ranker = Ranker.open(Path(sys.argv[1]), options=BackendOptions(threads=1), cache=cache, metrics=metrics)
request = random_request(ranker.bundle.manifest.schema, events=5, candidates=2, rng=np.random.default_rng(0))
ranker.rank(history=request.history, profile=request.profile, candidates=request.candidates, user="a")
loaded = "prometheus_client" in sys.modules
assert loaded == asked, loaded
if asked:
    import prometheus_client
    text = prometheus_client.generate_latest().decode()
    assert 'onetrans_requests_total{result="prefill"} 1.0' in text, text
print("done")
"""


@pytest.mark.parametrize("asked", ["asked", "not asked"])
def test_prometheus_is_imported_only_where_asked_for(tiny_bundle: Path, asked: str) -> None:
    """Without a registry of one's own the process's takes the metrics."""
    command = [sys.executable, "-c", ASKED, str(tiny_bundle), asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_without_prometheus_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingDependencyError) as caught:
        Metrics()
    assert str(caught.value) == (
        'metrics need prometheus_client, which is not installed: pip install "onetrans-export[metrics]"'
    )
