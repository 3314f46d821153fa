"""Request streams: random ones of a stated size, or those of a file, deterministic by seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onetrans.errors import ConfigError, DataError
from onetrans.features.encoder import RequestEncoder
from onetrans.features.random_requests import random_request
from onetrans.features.requests import Request, read_requests
from onetrans.runtime.manifest import Manifest

SPREADS = ("fixed", "uniform")


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """Random requests.

    Attributes:
        events: Events of each history.
        candidates: Candidates of each request.
        spread: `fixed`: every request is of that size. `uniform`: events uniform in 0 … `events` and candidates uniform
            in 1 … `candidates`, independently.
        seed: Seed of sizes and values.
    """

    events: int
    candidates: int
    spread: str = "fixed"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.spread not in SPREADS:
            raise ConfigError(f"unknown spread {self.spread!r}; allowed: {', '.join(SPREADS)}")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be at least 0")


def check_bounds(load: LoadConfig, manifest: Manifest) -> None:
    """Refuses sizes that the bundle does not take.

    Raises:
        ConfigError: Events or candidates are out of the bundle's bounds.
    """
    for name, value, dim in (("events", load.events, "L"), ("candidates", load.candidates, "C")):
        low, high = manifest.bounds[dim]
        if not low <= value <= high:
            raise ConfigError(f"{name} is {value}; this bundle takes {low} to {high}")


def random_requests(load: LoadConfig, manifest: Manifest) -> Iterator[Request]:
    """An endless stream.

    Raises:
        ConfigError: The load is out of the bundle's bounds.
    """
    check_bounds(load, manifest)
    rng = np.random.default_rng(load.seed)
    schema = manifest.schema
    while True:
        events, candidates = load.events, load.candidates
        if load.spread == "uniform":
            events, candidates = int(rng.integers(0, events + 1)), int(rng.integers(1, candidates + 1))
        yield random_request(schema, events=events, candidates=candidates, rng=rng)


def file_requests(path: str | Path, manifest: Manifest) -> list[Request]:
    """The requests of a JSON file or a log folder, each value checked before anything is measured.

    Raises:
        DataError: The file cannot be read, or a request does not fit the schema or the bundle's bounds.
    """
    requests = read_requests(path, manifest.schema)
    low, high = manifest.bounds["C"]
    encoder = RequestEncoder(schema=manifest.schema, merge=manifest.merge, pyramid=manifest.pyramid)
    for index, request in enumerate(requests):
        count = encoder.parse(request).count
        if not low <= count <= high:
            name = request.request or index
            raise DataError(f"{path}: request {name} has {count} candidates; this bundle takes {low} to {high}")
    return requests
