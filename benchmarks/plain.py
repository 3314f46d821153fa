"""export_time, parity and latency."""

from __future__ import annotations

import shutil
import uuid

from benchmarks.context import Context
from benchmarks.matmul import CANDIDATES
from benchmarks.measure import Measured, Row, estimated
from onetrans.bench.load import LoadConfig, random_requests
from onetrans.bench.record import make_record
from onetrans.bench.run import REQUESTS, bench_ranker
from onetrans.bench.stats import LEAST_SAMPLES, median, percentiles
from onetrans.parity.verify import check, read_cases, verify
from onetrans.runtime.backends.base import BackendOptions
from onetrans.runtime.ranker import Ranker

GIB = 2**30
EXPORT_SECONDS = {"tiny": 15.0, "onetrans-s": 60.0}
EXPORT_GIB = {"onetrans-s": 8.0}
EXPORT_RUNS = {"tiny": 5, "onetrans-s": 3}  # single runs of tiny spread from 13 to 16 s, around the target
RELATIVE_ERROR = 1e-5


def export_time(context: Context) -> Measured:
    """Wall time and memory of exports, each in a process of its own, parity gate included."""
    rows, samples = [], {}
    for preset in (context.large, context.small):
        runs = 1 if context.quick else EXPORT_RUNS.get(preset, 1)
        seconds, peak = [], 0.0
        for run in range(runs):
            output = context.place(f"{preset}-{uuid.uuid4().hex[:8]}")
            context.progress(f"exporting {preset}, {run + 1} of {runs}, target {EXPORT_SECONDS.get(preset, 0):.0f} s")
            done = context.export(preset, output)
            seconds.append(done.seconds)
            peak = max(peak, done.peak_bytes / GIB)
            kept = context.place(preset)
            if kept.exists():
                shutil.rmtree(output)
            else:
                output.rename(kept)
        samples[preset] = seconds
        middle = median(seconds, least=1)
        rows += [
            Row(
                what=f"export of {preset}, median of {runs} (fastest – slowest)",
                unit="s",
                value=middle.value,
                low=min(seconds),
                high=max(seconds),
                target=EXPORT_SECONDS.get(preset),
            ),
            Row(what=f"export of {preset}, peak memory", unit="GiB", value=peak, target=EXPORT_GIB.get(preset)),
        ]
    return Measured(
        rows=rows,
        samples=samples,
        notes=["from start to end of the process; the interval is the fastest and the slowest run"],
    )


def parity(context: Context) -> Measured:
    """The worst case's relative error, as the exporter recorded it and as measured again."""
    rows = []
    for preset in (context.small, context.large):
        ranker = Ranker.open(context.bundle(preset), options=BackendOptions(threads=context.threads))
        bundle = ranker.bundle
        context.progress(f"{preset}: comparing with gold")
        fresh = verify(bundle, ranker.backend, read_cases(bundle))
        check(fresh)
        recorded = max(float(result["relative_error"]) for result in bundle.manifest.parity["results"])
        again = max(result.relative_error for result in fresh)
        for text, value in (("at export", recorded), ("measured again", again)):
            what = f"{preset}, relative error to float64 gold, worst of {len(fresh)} cases, {text}"
            rows.append(Row(what=what, unit="", value=value, target=RELATIVE_ERROR))
    return Measured(rows=rows, notes=["Euclidean norm of the logits' error over that of gold"])


def latency(context: Context) -> Measured:
    """Percentiles per component over requests of full history and 100 candidates."""
    rows, records = [], {}
    count = LEAST_SAMPLES if context.quick else REQUESTS
    for preset in (context.large, context.small):
        ranker = Ranker.open(context.bundle(preset), options=BackendOptions(threads=context.threads))
        manifest = ranker.bundle.manifest
        results = verify(ranker.bundle, ranker.backend, read_cases(ranker.bundle))
        check(results)
        load = LoadConfig(events=manifest.pyramid.max_history, candidates=CANDIDATES)
        context.progress(f"{preset}: {count} requests")
        samples = bench_ranker(ranker, random_requests(load, manifest), count=count)
        records[preset] = make_record(
            manifest,
            samples,
            load={"requests": count, "input": None, **vars(load)},
            threads=context.threads,
            parity={"cases": len(results), "worst_relative_error": max(r.relative_error for r in results)},
        )
        for component, seconds in samples.seconds.items():
            for name, estimate in percentiles(seconds).items():
                rows.append(estimated(estimate, scale=1e3, what=f"{preset}, {component}, {name}", unit="ms"))
    return Measured(rows=rows, records=records)
