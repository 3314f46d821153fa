"""Runs a ranker under a request stream and keeps every sample."""

from __future__ import annotations

import gc
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from onetrans.bench.stats import LEAST_PAIRS, LEAST_SAMPLES
from onetrans.errors import ConfigError
from onetrans.features.requests import Request
from onetrans.runtime.ranker import Ranker

COMPONENTS = ("encode", "load", "prefill", "append", "decode", "drift", "offload", "whole")
REQUESTS = 200
WARMUP = 10
SPINNING = 0.06  # seconds; an engine's workers were seen to spin for 0.042 s after a run
GARBAGE_COLLECTOR = "collected before, off while measuring"


@dataclass(frozen=True)
class Samples:
    """Seconds per component, one entry per measured request, in order.

    Attributes:
        seconds: Components as the ranker states them, each of the requests in which it ran, and `whole`, the call as
            its caller sees it. A component that ran too rarely for percentiles is left out.
        warmup: Requests that ran before, unmeasured.
        notes: What the state cache did, and what was left out.
    """

    seconds: dict[str, list[float]]
    warmup: int
    notes: tuple[str, ...] = ()


@contextmanager
def quiet_collector() -> Iterator[None]:
    """Collects garbage, then keeps the collector off: its pauses would be charged to whichever request they hit."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def in_turn(
    runs: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 2, pause: float = SPINNING
) -> dict[str, list[float]]:
    """Seconds of every run, A B C A B C …, so that drift of the machine meets all alike.

    Args:
        runs: By name; timed from outside.
        rounds: Measured rounds, at least LEAST_PAIRS.
        warmup: Rounds before, unmeasured.
        pause: Seconds of sleep before each run, so that the threads of the run before have gone to rest.
    """
    assert rounds >= LEAST_PAIRS
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with quiet_collector():
        for index in range(warmup + rounds):
            for name, run in runs.items():
                time.sleep(pause)
                began = time.perf_counter()
                run()
                taken = time.perf_counter() - began
                if index >= warmup:
                    seconds[name].append(taken)
    return seconds


def bench_ranker(
    ranker: Ranker,
    requests: Iterable[Request],
    *,
    count: int = REQUESTS,
    warmup: int = WARMUP,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Samples:
    """Ranks requests one after another on the monotonic clock (`time.perf_counter`).

    Requests are taken before measuring begins and repeated where there are fewer than `count`, so the clock sees
    ranking alone.

    Args:
        ranker: Opened.
        requests: At least one; of an endless stream only `count` are taken.
        count: Requests to measure, at least LEAST_SAMPLES.
        warmup: Requests to rank before, at least 1: the first calls allocate.
        progress: Called between requests with the number ranked and the total, warmup included.

    Raises:
        ConfigError: Too few to measure, or no request.
        DataError: A request does not fit the bundle.
    """
    if count < LEAST_SAMPLES:
        raise ConfigError(f"{count} requests are too few to measure; ask for at least {LEAST_SAMPLES}")
    if warmup < 1:
        raise ConfigError(f"warmup is {warmup}; it must be at least 1")
    taken = list(itertools.islice(requests, count))
    if not taken:
        raise ConfigError("there is no request to measure; give at least one")
    stream = itertools.cycle(taken)
    seconds: dict[str, list[float]] = {name: [] for name in COMPONENTS}
    results: Counter[str] = Counter()
    total = count + warmup
    with quiet_collector():
        for index in range(total):
            request = next(stream)
            began = time.perf_counter()
            scores = ranker.rank(
                history=request.history, profile=request.profile, candidates=request.candidates, user=request.user
            )
            whole = time.perf_counter() - began
            if index >= warmup:
                results[scores.result] += 1
                for name, value in {**scores.seconds, "whole": whole}.items():
                    seconds[name].append(value)
            progress(index + 1, total)
    rare = [name for name, values in seconds.items() if 0 < len(values) < LEAST_SAMPLES]
    notes = [f"answered by {', '.join(f'{kind} {n}' for kind, n in sorted(results.items()))}"] if ranker.caches else []
    notes += [f"{name} ran {len(seconds[name])} times, too rarely for percentiles" for name in rare]
    kept = {name: values for name, values in seconds.items() if len(values) >= LEAST_SAMPLES}
    return Samples(kept, warmup, tuple(notes))
