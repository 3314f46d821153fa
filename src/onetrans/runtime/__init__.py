"""Serving: the bundle reader, the backends, and the Ranker. Needs no torch for targets whose bundles are data."""

from onetrans.runtime.bundle import Bundle
from onetrans.runtime.cache.config import CacheConfig
from onetrans.runtime.metrics import Metrics
from onetrans.runtime.ranker import Ranker, Scores

__all__ = ["Bundle", "CacheConfig", "Metrics", "Ranker", "Scores"]
