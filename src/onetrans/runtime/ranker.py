"""The Ranker: requests in, scores out, with the states of returning users kept."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onetrans.errors import BundleError, DataError, StateError
from onetrans.features.encode import CandidatesLike
from onetrans.features.encoder import RequestEncoder
from onetrans.features.merge import History
from onetrans.features.requests import Request
from onetrans.runtime.backends.base import Backend, BackendOptions
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.cache.config import CacheConfig
from onetrans.runtime.cache.lookup import CacheEntry, Policy
from onetrans.runtime.cache.offload import OffloadFile
from onetrans.runtime.cache.state_cache import Key, StateCache
from onetrans.runtime.metrics import Metrics
from onetrans.runtime.model_version import ModelVersion
from onetrans.runtime.ranking import BatchRanking, RankingContext
from onetrans.runtime.scores import Scores
from onetrans.runtime.targets import Trust, open_backend


class Ranker:
    """Scores candidates with a bundle; keeps users' states if given memory for them. Safe to call from many threads."""

    def __init__(
        self, bundle: Bundle, backend: Backend, config: CacheConfig | None = None, metrics: Metrics | None = None
    ) -> None:
        """Allocates the states' memory.

        Raises:
            ConfigError: The memory does not hold two users.
        """
        self.config = config or CacheConfig()
        self.metrics = metrics
        c, folder = self.config, self.config.offload
        slots, compute_slots = c.slots(bundle.manifest.bytes_per_user)
        self.pool = backend.allocate(slots)
        self.cache = StateCache(slots, compute_slots=compute_slots, ttl=c.ttl, keeps_evicted=folder is not None)
        self.offload: OffloadFile | None = None
        if folder is not None:
            self.offload = OffloadFile(bundle.manifest, folder, c.offload_memory, c.offload_precision)
        self._version = self._version_of(bundle, backend)
        self._device: str | None = None
        self._options: BackendOptions | None = None
        self._trust: Trust = "data"
        self._stale = itertools.count(1)
        if metrics is not None:
            metrics.watch(self)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        device: str | None = None,
        options: BackendOptions | None = None,
        cache: CacheConfig | None = None,
        metrics: Metrics | None = None,
        trust: Trust = "data",
    ) -> Ranker:
        """Opens a bundle for ranking.

        Args:
            path: The bundle.
            device: Where to compute, as `cpu`; the first device of the bundle's target if left out. No other is tried.
            options: What the backend may use, as its threads; its own choice if left out.
            cache: Memory for users' states and what to do with it; without, every request is prefilled.
            metrics: Where to count and time; nowhere if left out.
            trust: `code` also opens a bundle whose files are programs, here and at `reload`; see `Bundle.open`.

        Raises:
            BundleError: The bundle cannot be opened.
            ConfigError: The memory does not hold two users, or the target does not run on the device.
            MissingDependencyError: The backend's package, driver or device is absent.
        """
        bundle = Bundle.open(path, trust=trust)
        ranker = cls(bundle, open_backend(bundle, device, options), cache, metrics)
        ranker._device, ranker._options, ranker._trust = device, options, trust
        return ranker

    @property
    def bundle(self) -> Bundle:
        """The bundle in use."""
        return self._version.bundle

    @property
    def backend(self) -> Backend:
        """The backend in use."""
        return self._version.backend

    @property
    def encoder(self) -> RequestEncoder:
        """Makes the inputs of the model in use."""
        return self._version.encoder

    @property
    def caches(self) -> bool:
        """Whether states of returning users are kept."""
        return self.cache.capacity > 0

    def rank(
        self, *, history: History, profile: Mapping[str, Any], candidates: CandidatesLike, user: str = ""
    ) -> Scores:
        """Scores one user's candidates.

        Args:
            history: The user's events, all of them since the first: mappings, or a mapping of columns.
            profile: User features, the request's context among them.
            candidates: From one to the bundle's most.
            user: Whose state to use and to keep; nothing is kept if left out.

        Raises:
            DataError: A value is missing, of the wrong kind or out of bounds.
        """
        request = Request(history=history, profile=profile, candidates=candidates, user=user)
        return self._rank([request], [""])[0]

    def rank_batch(self, requests: Sequence[Request]) -> list[Scores]:
        """Scores several users' candidates together (`config.compute_slots` users at a time).

        Args:
            requests: One of each user, and any number without a user's name, whose states are not kept.

        Raises:
            DataError: A user stands twice, or a value is missing, of the wrong kind or out of bounds; nothing was
                ranked and the cache is untouched.
        """
        seen: dict[str, int] = {}
        for index, request in enumerate(requests):
            if request.user and seen.setdefault(request.user, index) != index:
                raise DataError(
                    f"user {request.user!r} stands in requests {seen[request.user]} and {index} of one batch; a batch"
                    " takes one request of each user: join their candidates, or rank them one after another"
                )
        return self._rank(requests, [f"request {index}" for index in range(len(requests))])

    def reload(self, path: str | Path) -> None:
        """Goes over to another version of the model, as after a retraining; requests under way end with the old one.

        States of the old version are forgotten: a state fits the weights that made it.

        Raises:
            BundleError: The bundle cannot be opened, or its states have another layout or precision; the version in use
                and its states stay.
        """
        bundle = Bundle.open(path, trust=self._trust)
        now, new = self.bundle.manifest, bundle.manifest
        for name in ("target", "precision", "state", "pyramid"):
            if getattr(now, name) != getattr(new, name):
                shown = f" ({getattr(new, name)}, not {getattr(now, name)})" if name in ("target", "precision") else ""
                raise BundleError(
                    f"{path} cannot take the place of {self.bundle.path}: its {name} differs{shown}; open a Ranker of"
                    " its own for it"
                )
        self._version = self._version_of(bundle, open_backend(bundle, self._device, self._options))
        self._forget_other_versions()

    def invalidate(self, user: str) -> bool:
        """Forgets a user's state, after the request under way; whether there was one."""
        key = (self._version.name, user)
        with self.cache.use([key]) as lease:
            offloaded = self.offload is not None and self.offload.forget(key)
            return lease.forget(key) or offloaded

    def check_integrity(self) -> None:
        """Checks slots, budget, and that each idle state has the windows that its token count asks for.

        Raises:
            StateError: Something is wrong; a defect of this package.
        """
        self.cache.check_integrity()
        pyramid = self.bundle.manifest.pyramid

        def check(key: Key, entry: CacheEntry) -> None:
            expected = [entry.tokens - start for start in pyramid.key_starts(entry.tokens)]
            found = self.pool.lengths(entry.slot).tolist()
            if found != expected:
                raise StateError(
                    f"the state of user {key[1]!r} has windows of {found} tokens, where {entry.tokens} events give"
                    f" {expected}"
                )

        self.cache.visit(check)

    def _version_of(self, bundle: Bundle, backend: Backend) -> ModelVersion:
        policy = Policy(
            pyramid=bundle.manifest.pyramid,
            can_append=bundle.manifest.can_append,
            reuse=self.config.reuse,
            stale_crossings=self.config.stale_crossings,
        )
        return ModelVersion(bundle=bundle, backend=backend, policy=policy)

    def _rank(self, requests: Sequence[Request], labels: Sequence[str]) -> list[Scores]:
        began = time.perf_counter()
        version = self._version
        context = RankingContext(
            version=version,
            cache=self.cache,
            pool=self.pool,
            offload=self.offload,
            drift_is_due=self._drift_is_due,
        )
        users = [version.parse(r, label, keep=self.caches) for r, label in zip(requests, labels, strict=True)]
        size = min(self.cache.compute_slots, version.bundle.manifest.bounds["U"][1])
        batches = [BatchRanking(context, users[first : first + size]) for first in range(0, len(users), size)]
        seconds = {"encode": time.perf_counter() - began}
        scores: list[list[Scores]] = []
        try:
            for batch in batches:
                scores.append(batch.run(seconds))  # noqa: PERF401  (what was ranked before a failure is counted)
        finally:
            if version is not self._version:
                self._forget_other_versions()
            if self.metrics is not None:
                self.metrics.observe(scores)
        return list(itertools.chain.from_iterable(scores))

    def _drift_is_due(self) -> bool:
        return next(self._stale) % self.config.drift_every == 0

    def _forget_other_versions(self) -> None:
        """Called after a reload, and by each request that was under way then and may have kept a state since."""
        version = self._version.name
        self.cache.clear(keep=lambda key: key[0] == version)
        if self.offload is not None:
            self.offload.clear(keep=lambda key: key[0] == version)
