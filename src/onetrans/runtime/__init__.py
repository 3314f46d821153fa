"""Serving: the table of targets, the bundle reader, the backends, and the Ranker. Needs no torch for data bundles.

Names are imported when they are asked for, so that the command line answers `--help` without numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from onetrans.errors import (
    BundleError,
    ConfigError,
    DataError,
    JobError,
    MissingDependencyError,
    OneTransError,
    StateError,
)

if TYPE_CHECKING:
    from onetrans.features.requests import Request
    from onetrans.runtime.backends.base import BackendOptions
    from onetrans.runtime.bundle import Bundle
    from onetrans.runtime.cache.config import CacheConfig
    from onetrans.runtime.metrics import Metrics
    from onetrans.runtime.ranker import Ranker
    from onetrans.runtime.scores import Scores

__all__ = [
    "BackendOptions",
    "Bundle",
    "BundleError",
    "CacheConfig",
    "ConfigError",
    "DataError",
    "JobError",
    "Metrics",
    "MissingDependencyError",
    "OneTransError",
    "Ranker",
    "Request",
    "Scores",
    "StateError",
]

_HOMES = {
    "BackendOptions": "onetrans.runtime.backends.base",
    "Bundle": "onetrans.runtime.bundle",
    "CacheConfig": "onetrans.runtime.cache.config",
    "Metrics": "onetrans.runtime.metrics",
    "Ranker": "onetrans.runtime.ranker",
    "Request": "onetrans.features.requests",
    "Scores": "onetrans.runtime.scores",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
