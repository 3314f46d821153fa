"""What the parts of a request cost on this machine, measured at the lengths that a trace has."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onetrans.bench.run import quiet_collector
from onetrans.errors import ConfigError
from onetrans.features.random_requests import random_request
from onetrans.features.requests import Request
from onetrans.features.windows import Pyramid
from onetrans.runtime.ranker import Ranker
from onetrans.sizing.arrivals import Trace

RANKS = (10, 30, 50, 70, 90)  # percentiles of the trace's lengths
CANDIDATES = 100
REPEATS = 3
WARMUP = 1
STATES = 8  # users in the cache that is measured with


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Mean milliseconds of a request's parts.

    Attributes:
        prefill: Where there is no state to use.
        append: Where a state gets new events, or another profile or context.
        decode: Milliseconds of every request, whatever else it costs: encoding, lookup and decode.
    """

    prefill: float
    append: float
    decode: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ConfigError(f"{name} takes {value} ms; give milliseconds above 0")


def measure(
    ranker: Ranker,
    trace: Trace,
    *,
    candidates: int,
    progress: Callable[[str], None] = lambda stage: None,
) -> Costs:
    """Ranks a few users with a Ranker that keeps states, and again with more events.

    Each cost is the mean over five lengths of the median of `REPEATS`. Where nothing in the trace could be appended,
    an append costs what a prefill does.

    Args:
        ranker: With memory for `STATES` users.
        trace: Whose lengths to take.
        candidates: Candidates of each request.
        progress: Told each stage.

    Raises:
        ConfigError: The bundle does not take so many candidates.
    """
    manifest = ranker.bundle.manifest
    low, high = manifest.bounds["C"]
    if not low <= candidates <= high:
        raise ConfigError(f"candidates is {candidates}; this bundle takes {low} to {high}")
    cases: list[tuple[int, ...]] = [(int(n),) for n in np.percentile(trace.tokens, RANKS, method="nearest")]
    if "append" in manifest.graphs:
        cases += _appends(trace, manifest.pyramid)
    users = (f"user {index}" for index in itertools.count())
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {"prefill": [], "append": [], "decode": []}
    with quiet_collector():
        for index, lengths in enumerate(cases):
            part = "append" if len(lengths) > 1 else "prefill"
            progress(f"measuring {part} {index % len(RANKS) + 1} of {len(RANKS)}: {lengths[-1]} events")
            request = random_request(manifest.schema, events=lengths[-1], candidates=candidates, rng=rng)
            samples = [_rank(ranker, request, lengths, next(users)) for _ in range(WARMUP + REPEATS)][WARMUP:]
            computing, whole = np.median([(seconds[part], seconds["whole"]) for seconds in samples], axis=0)
            found[part].append(computing)
            found["decode"].append(whole - computing)
    means = {part: 1e3 * float(np.mean(seconds or found["prefill"])) for part, seconds in found.items()}
    return Costs(**means)


def _appends(trace: Trace, pyramid: Pyramid) -> list[tuple[int, ...]]:
    """Histories before and after an append, few new events to many."""
    pairs = zip((trace.tokens - trace.fresh).tolist(), trace.tokens.tolist(), strict=True)
    exact = sorted(
        (after - before, before) for before, after in pairs if before < after and pyramid.can_append(before, after)
    )
    chosen = [exact[len(exact) * rank // 100] for rank in RANKS] if exact else []
    return [(before, before + fresh) for fresh, before in chosen]


def _rank(ranker: Ranker, request: Request, lengths: Sequence[int], user: str) -> dict[str, float]:
    """Seconds per component, and `whole`, of the last of a user's requests, whose history has these lengths in turn."""
    assert isinstance(request.history, Mapping)
    for length in lengths:
        history = {name: column[:length] for name, column in request.history.items()}
        began = time.perf_counter()
        scores = ranker.rank(history=history, profile=request.profile, candidates=request.candidates, user=user)
        whole = time.perf_counter() - began
    return {**scores.seconds, "whole": whole}
