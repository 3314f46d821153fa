"""export_time, parity, latency and soak of whole bundles."""

from __future__ import annotations

import shutil
import uuid

from benchmarks.context import LARGE, SMALL, Context
from onetrans.bench.load import LoadConfig, random_requests
from onetrans.bench.record import make_record
from onetrans.bench.run import REQUESTS, bench_ranker
from onetrans.bench.soak import soak as soak_ranker
from onetrans.bench.stats import LEAST_SAMPLES, median
from onetrans.bench.suite import Outcome

GIB = 2**30
EXPORT_SECONDS = {SMALL: 15.0, LARGE: 60.0}
EXPORT_GIB = {LARGE: 8.0}
EXPORT_RUNS = {SMALL: 5, LARGE: 3}  # single runs of tiny spread from 13 to 16 s, around the target
RELATIVE_ERROR = 1e-5
CANDIDATES = 100
SOAKED, CACHED = 100_000, 100


def export_time(context: Context) -> Outcome:
    """Wall time and memory of exports, each in a process of its own, parity gate included."""
    outcome = Outcome(notes=["from start to end of the process; the interval is the fastest and the slowest run"])
    for model in (LARGE, SMALL):
        runs = 1 if context.quick else EXPORT_RUNS[model]
        seconds, peak = [], 0.0
        for run in range(runs):
            output = context.path(f"{model}-{uuid.uuid4().hex[:8]}")
            context.progress(f"exporting {model}, {run + 1} of {runs}, target {EXPORT_SECONDS[model]:.0f} s")
            taken, resident = context.export(model, output)
            seconds.append(taken)
            peak = max(peak, resident / GIB)
            kept = context.path(model)
            if kept.exists():
                shutil.rmtree(output)
            else:
                output.rename(kept)
        outcome.samples[model] = seconds
        name, middle = f"export of {model}, median of {runs} (fastest – slowest)", median(seconds, least=1).value
        ends = {"low": min(seconds), "high": max(seconds), "target": EXPORT_SECONDS[model]}
        outcome.figure(name, middle, "s", **ends)
        outcome.figure(f"export of {model}, peak memory", peak, "GiB", target=EXPORT_GIB.get(model))
    return outcome


def parity(context: Context) -> Outcome:
    """The worst case's relative error, as the exporter recorded it and as measured again."""
    outcome = Outcome(notes=["Euclidean norm of the logits' error over that of the float64 reference"])
    for model in (SMALL, LARGE):
        ranker = context.ranker(model)
        context.progress(f"{model}: comparing with the reference")
        fresh = context.verified(ranker)
        recorded = max(float(result["relative_error"]) for result in ranker.bundle.manifest.parity["results"])
        again = max(result.relative_error for result in fresh)
        for when, value in (("at export", recorded), ("measured again", again)):
            name = f"{model}, relative error to the float64 reference, worst of {len(fresh)} cases, {when}"
            outcome.figure(name, value, target=RELATIVE_ERROR)
    return outcome


def latency(context: Context) -> Outcome:
    """Percentiles per component over requests of full history and 100 candidates."""
    outcome, count = Outcome(), LEAST_SAMPLES if context.quick else REQUESTS
    for model in (LARGE, SMALL):
        ranker = context.ranker(model)
        manifest, results = ranker.bundle.manifest, context.verified(ranker)
        load = LoadConfig(events=manifest.pyramid.max_history, candidates=CANDIDATES)
        context.progress(f"{model}: {count} requests")
        samples = bench_ranker(ranker, random_requests(load, manifest), count=count)
        outcome.records[model] = make_record(
            manifest,
            samples,
            load={"requests": count, "input": None, **vars(load)},
            threads=context.threads,
            parity={"cases": len(results), "worst_relative_error": max(r.relative_error for r in results)},
        )
        for component, seconds in samples.seconds.items():
            outcome.percentiles(f"{model}, {component}", seconds)
    return outcome


def soak(context: Context) -> Outcome:
    """100,000 mixed requests on tiny, with memory for a quarter of the users' states."""
    plain, cached = context.ranker(SMALL, threads=1), context.ranker(SMALL, threads=1, states=CACHED)
    return soak_ranker(plain, cached, 2_000 if context.quick else SOAKED, context.progress)
