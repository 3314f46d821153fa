"""Serving: the bundle reader, the backends, and the Ranker. Needs no torch for targets whose bundles are data."""

from onetrans.errors import (
    BundleError,
    ConfigError,
    DataError,
    JobError,
    MissingDependencyError,
    OneTransError,
    StateError,
)
from onetrans.features.requests import Request
from onetrans.runtime.backends.base import BackendOptions
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.cache.config import CacheConfig
from onetrans.runtime.metrics import Metrics
from onetrans.runtime.ranker import Ranker, Scores

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
