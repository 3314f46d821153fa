"""One ranking pass: users' states looked up, computed where they must be, and all candidates decoded together."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onetrans.errors import DataError
from onetrans.features.encode import CandidatesLike, encode_candidates, encode_tokens, encode_users
from onetrans.features.merge import TokenColumns, merge_tokens, parse_history
from onetrans.features.requests import Request
from onetrans.runtime.backends.base import Backend
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.cache.fingerprint import RunningHash, context_digest
from onetrans.runtime.cache.lookup import Held, Kind, Lookup, Policy, look_up
from onetrans.runtime.cache.spill import SpillFile
from onetrans.runtime.cache.state_cache import Key, Lease, StateCache
from onetrans.runtime.pools.base import StatePool

log = logging.getLogger(__name__)

Inputs = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Scores:
    """Scores of one request's candidates, in the order they were given.

    Attributes:
        logits: Per task, float32 [C].
        seconds: Time spent per component, as far as it ran: `encode`, `load`, `prefill`, `append`, `decode`, `drift`,
            `spill`. Of a request that was ranked together with others, what they took together.
        result: What the cache did: `reuse`, `append`, `prefill` or `stale`.
        fresh: Events computed for this request.
        drift: Largest difference of a logit from that of a fresh prefill, where it was measured (stale requests).
    """

    logits: Mapping[str, NDArray[np.float32]]
    seconds: Mapping[str, float]
    result: Kind = "prefill"
    fresh: int = 0
    drift: float | None = None

    def probabilities(self) -> dict[str, NDArray[np.float32]]:
        """Per task, float32 [C]; cvr is conditional on a click."""
        return {task: (1 / (1 + np.exp(-z.astype(np.float64)))).astype(np.float32) for task, z in self.logits.items()}

    def ranking(self, task: str | None = None) -> NDArray[np.int64]:
        """Candidate indices, best first by a task's logit (the first task by default); ties keep the order given."""
        logits = self.logits[task or next(iter(self.logits))]
        return np.argsort(-logits, kind="stable")


@dataclass(frozen=True, eq=False)
class Encoded:
    """The user's part of a checked request.

    Attributes:
        key: Of its state; None where none is kept.
        tokens: The whole history, merged.
        history: Their running hash.
        profile: User inputs [1, …].
        context: Their hash.
    """

    key: Key | None
    tokens: TokenColumns
    history: RunningHash
    profile: Inputs
    context: bytes


@dataclass(frozen=True, eq=False)
class Loaded:
    """One version of the model, and how requests become its inputs."""

    bundle: Bundle
    backend: Backend
    version: str
    policy: Policy

    def encode(self, request: Request, where: str, *, keep: bool = False) -> Encoded:
        """Checks a request's history and profile; `where` stands first in errors.

        Raises:
            DataError: A value is missing, of the wrong kind or out of bounds.
        """
        manifest = self.bundle.manifest
        history = parse_history(manifest.schema, request.history, where=f"{where}history")
        tokens = merge_tokens(manifest.schema, history, manifest.merge)
        profile = encode_users(manifest.schema, [request.profile], where=f"{where}profile")
        key = (self.version, request.user) if keep and request.user else None
        return Encoded(key, tokens, RunningHash(tokens), profile, context_digest(profile))

    def candidates(
        self, candidates: Sequence[CandidatesLike], places: Sequence[str]
    ) -> tuple[Inputs, NDArray[np.int64]]:
        """Candidate inputs [U, C, …] and each user's count [U].

        Raises:
            DataError: A value is missing, of the wrong kind or out of bounds.
        """
        manifest = self.bundle.manifest
        inputs, counts = encode_candidates(
            manifest.schema, candidates, labels=[f"{where}candidates" for where in places]
        )
        most = manifest.bounds["C"][1]
        for where, count in zip(places, counts, strict=True):
            if count > most:
                raise DataError(
                    f"{where}{count} candidates were given; this bundle takes 1 to {most}: score them in parts"
                )
        return inputs, counts

    def start(self, encoded: Encoded) -> int:
        """The first token that a prefill sees."""
        return self.bundle.manifest.pyramid.key_starts(encoded.history.tokens)[0]

    def events(self, encoded: Sequence[Encoded], starts: Sequence[int]) -> Inputs:
        """History inputs [U, …] of the tokens from `starts` on."""
        return encode_tokens(self.bundle.manifest.schema, [one.tokens for one in encoded], starts)


class Pass:
    """One pass over a batch of users.

    Args:
        loaded: The model.
        cache: Slots.
        pool: What is in them.
        spill: Takes and gives back states that do not fit the pool; None for none.
        encoded: One per user.
        candidates: Inputs [U, C, …].
        counts: Candidates of each user [U].
        measures_drift: Whether the next stale user is prefilled as well.
        seconds: Time spent so far per component; grows.
    """

    def __init__(
        self,
        loaded: Loaded,
        cache: StateCache,
        pool: StatePool,
        spill: SpillFile | None,
        encoded: Sequence[Encoded],
        candidates: Inputs,
        counts: NDArray[np.int64],
        measures_drift: Callable[[], bool],
        seconds: dict[str, float],
    ) -> None:
        self.loaded = loaded
        self.cache = cache
        self.pool = pool
        self.spill = spill
        self.encoded = encoded
        self.candidates = candidates
        self.counts = counts
        self.measures_drift = measures_drift
        self.seconds = seconds

    def run(self) -> list[Scores]:
        """Ranks. What was computed is kept as soon as it is whole, even if a later step fails."""
        with self.cache.use([one.key for one in self.encoded if one.key is not None]) as lease:
            try:
                return self._rank(lease)
            finally:
                self._spill(lease)

    def _rank(self, lease: Lease) -> list[Scores]:
        everyone = range(len(self.encoded))
        found = [self._look_up(lease, one) for one in self.encoded]
        loaded = [u for u in everyone if found[u].spilled]
        moved = [u for u in everyone if any(found[u].drop)]
        checked = [u for u in everyone if found[u].kind == "stale" and u not in loaded and self.measures_drift()]
        needing = [u for u in everyone if found[u].held is None or u in {*loaded, *moved, *checked}]
        spare = dict(zip(needing, lease.take(len(needing)), strict=True))
        for user in loaded:
            found[user] = self._load(lease, user, found[user], spare[user])
        fresh = [u for u in everyone if found[u].held is None]
        slots = [spare[u] if u in {*fresh, *moved} else _held(found[u]).slot for u in everyone]
        self._compute("prefill", fresh, found, slots)
        self._commit(lease, fresh, found, slots)
        for user in moved:
            self.pool.copy(_held(found[user]).slot, slots[user], found[user].drop)
        renewed = [u for u in everyone if found[u].held is not None and found[u].recompute]
        self._compute("append", renewed, found, slots)
        # A moved state that is about to be replaced by the exact one is in that one's slot: it is not kept.
        self._commit(lease, [u for u in renewed if not (u in checked and u in moved)], found, slots)
        logits = self._decode("decode", list(everyone), slots)
        drift = {u: self._drift(lease, u, found[u], spare[u], logits) for u in checked}
        return [
            Scores(
                logits={task: value[user, :count] for task, value in logits.items()},
                seconds=self.seconds,
                result=found[user].kind,
                fresh=found[user].fresh,
                drift=drift.get(user),
            )
            for user, count in enumerate(self.counts)
        ]

    def _look_up(self, lease: Lease, one: Encoded) -> Lookup:
        policy, spill = self.loaded.policy, self.spill
        held = None if one.key is None else lease.look(one.key)
        if held is None and one.key is not None and spill is not None:
            spilled = spill.look(one.key)
            spilled = None if spilled is None or self.cache.expired(spilled) else spilled
            found = look_up(policy, spilled, one.history, one.context)
            if found.held is not None and not any(found.drop):  # across an anchor a spilled state is not carried
                return dataclasses.replace(found, spilled=True)
        return look_up(policy, held, one.history, one.context)

    def _load(self, lease: Lease, user: int, look: Lookup, slot: int) -> Lookup:
        """Brings a spilled state into a slot; a prefill where the disk failed."""
        one, held = self.encoded[user], _held(look)
        assert one.key is not None
        assert self.spill is not None
        with self._timed("load"):
            state = self.spill.take(one.key)
            if state is None:
                return look_up(self.loaded.policy, None, one.history, one.context)
            self.pool.write(slot, state)
        held = dataclasses.replace(held, slot=slot)
        lease.commit(one.key, held, computed=False)
        return dataclasses.replace(look, held=held)

    def _spill(self, lease: Lease) -> None:
        """Saves what this pass drove out of the memory, after the scores are known or a step has failed."""
        if self.spill is not None and lease.evicted:
            with self._timed("spill"):
                for key, held in lease.evicted:
                    try:
                        self.spill.put(key, held, self.pool.read(held.slot))
                    except Exception as error:  # a state that is lost costs a prefill, not this request
                        log.warning("a state could not be spilled: %s", error)

    def _compute(self, graph: str, users: list[int], found: Sequence[Lookup], slots: Sequence[int]) -> None:
        if not users:
            return
        chosen = [self.encoded[u] for u in users]
        with self._timed(graph):
            if graph == "prefill":
                starts, run = [self.loaded.start(one) for one in chosen], self.loaded.backend.prefill
            else:
                starts, run = [_held(found[u]).tokens for u in users], self.loaded.backend.append
            run(self.pool, [slots[u] for u in users], {**self.loaded.events(chosen, starts), **self._profiles(users)})

    def _commit(self, lease: Lease, users: list[int], found: Sequence[Lookup], slots: Sequence[int]) -> None:
        for user in users:
            self._keep(lease, user, found[user], slots[user], found[user].crossings)
            key = self.encoded[user].key
            if self.spill is not None and key is not None:
                self.spill.forget(key)  # an older one

    def _keep(self, lease: Lease, user: int, look: Lookup, slot: int, crossings: int) -> None:
        one = self.encoded[user]
        if one.key is not None:
            lease.commit(
                one.key,
                Held(slot=slot, tokens=look.tokens, events=look.events, context=one.context, crossings=crossings),
            )

    def _decode(self, component: str, users: list[int], slots: Sequence[int]) -> dict[str, NDArray[np.float32]]:
        with self._timed(component):
            inputs = {name: value[users] for name, value in self.candidates.items()} | self._profiles(users)
            return self.loaded.backend.decode(self.pool, slots, inputs, self.counts[users])

    def _drift(
        self, lease: Lease, user: int, look: Lookup, slot: int, stale: Mapping[str, NDArray[np.float32]]
    ) -> float:
        """Prefills a stale user as well; the exact state takes the place of the stale one."""
        one = self.encoded[user]
        with self._timed("drift"):
            inputs = {**self.loaded.events([one], [self.loaded.start(one)]), **one.profile}
            self.loaded.backend.prefill(self.pool, [slot], inputs)
        self._keep(lease, user, look, slot, crossings=0)
        exact = self._decode("drift", [user], [slot])
        count = int(self.counts[user])
        return max(float(np.abs(value[0, :count] - stale[task][user, :count]).max()) for task, value in exact.items())

    def _profiles(self, users: Sequence[int]) -> Inputs:
        profiles = [self.encoded[u].profile for u in users]
        return {name: np.concatenate([profile[name] for profile in profiles]) for name in profiles[0]}

    @contextmanager
    def _timed(self, component: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[component] = self.seconds.get(component, 0.0) + time.perf_counter() - began


def _held(look: Lookup) -> Held:
    assert look.held is not None
    return look.held
