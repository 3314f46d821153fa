"""Counters and histograms of a Ranker for Prometheus; only where someone asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from onetrans.errors import MissingDependencyError
from onetrans.runtime.cache.lookup import KINDS

if TYPE_CHECKING:
    from onetrans.runtime.ranker import Ranker
    from onetrans.runtime.scores import Scores

SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
DRIFT = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
GONE = ("evicted", "expired", "invalidated", "turned_away")


class Metrics:
    """Counts and times what one Ranker does.

    Names, all beginning with `onetrans_`: `requests_total{result}`, `candidates_total`, `events_total` (computed),
    `component_seconds{component}` (of a batch, once), `drift` (of stale requests, where measured),
    `states_gone_total{reason}`, and the gauges `states`, `state_bytes` and `state_bytes_limit`.
    """

    def __init__(self, registry: Any = None) -> None:
        """Registers the metrics.

        Args:
            registry: A `prometheus_client.CollectorRegistry`; the process's own if left out.

        Raises:
            MissingDependencyError: prometheus_client is not installed.
        """
        try:
            import prometheus_client.core
        except ImportError as error:
            raise MissingDependencyError(
                'metrics need prometheus_client, which is not installed: pip install "onetrans-export[metrics]"'
            ) from error
        self._client = prometheus_client
        self.registry = registry or prometheus_client.REGISTRY
        own: dict[str, Any] = {"namespace": "onetrans", "registry": self.registry}
        self._requests = prometheus_client.Counter("requests", "Requests ranked.", ["result"], **own)
        self._candidates = prometheus_client.Counter("candidates", "Candidates scored.", **own)
        self._events = prometheus_client.Counter("events", "Events computed by prefill and append.", **own)
        self._seconds = prometheus_client.Histogram(
            "component_seconds", "Time per component of users ranked together.", ["component"], buckets=SECONDS, **own
        )
        self._drift = prometheus_client.Histogram(
            "drift", "Largest difference of a stale request's logit from a fresh prefill's.", buckets=DRIFT, **own
        )
        for kind in KINDS:
            self._requests.labels(kind)

    def watch(self, ranker: Ranker) -> None:
        """Reports the cache of a Ranker, read when someone collects."""
        self.registry.register(_CacheCollector(self._client, ranker))

    def observe(self, batches: Sequence[Sequence[Scores]]) -> None:
        """Counts a call's requests; those of one batch share their times, those of all batches the encoding."""
        for index, scores in enumerate(batches):
            for one in scores:
                self._requests.labels(one.result).inc()
                self._candidates.inc(len(next(iter(one.logits.values()))))
                self._events.inc(one.fresh)
                if one.drift is not None:
                    self._drift.observe(one.drift)
            for component, seconds in scores[0].seconds.items():
                if component == "encode" and index:
                    continue
                self._seconds.labels(component).observe(seconds)


class _CacheCollector:
    def __init__(self, client: Any, ranker: Ranker) -> None:
        self._client = client
        self._ranker = ranker

    def describe(self) -> list[Any]:
        """Nothing in advance, so that registering does not collect."""
        return []

    def collect(self) -> Iterator[Any]:
        """The cache as it is now."""
        core, cache = self._client.core, self._ranker.cache
        size = self._ranker.bundle.manifest.bytes_per_user
        gone = core.CounterMetricFamily("onetrans_states_gone", "States that left the cache.", labels=["reason"])
        for reason in GONE:
            gone.add_metric([reason], cache.counts[reason])
        yield gone
        yield core.GaugeMetricFamily("onetrans_states", "States cached now.", len(cache))
        yield core.GaugeMetricFamily("onetrans_state_bytes", "Bytes of the states cached now.", len(cache) * size)
        yield core.GaugeMetricFamily("onetrans_state_bytes_limit", "Bytes of all slots.", self._ranker.pool.nbytes)
