"""A record of a few requests, for tests of what is made of records."""

from __future__ import annotations

from typing import Any

from onetrans.bench.load import LoadConfig, random_requests
from onetrans.bench.record import make_record
from onetrans.bench.run import bench_ranker
from onetrans.runtime.ranker import Ranker


def short_record(ranker: Ranker) -> dict[str, Any]:
    """23 requests of 9 events and 5 candidates."""
    manifest = ranker.bundle.manifest
    load = LoadConfig(events=9, candidates=5)
    samples = bench_ranker(ranker, random_requests(load, manifest), count=23, warmup=2)
    shape = {"requests": 23, "input": None, **vars(load)}
    return make_record(manifest, samples, load=shape, threads=1, parity={"cases": 9}, notes=("short | rough",))
