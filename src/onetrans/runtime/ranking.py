"""Ranking a batch of users: a plan for each user first, then prefill, append and decode by what the plans say."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from onetrans.features.columns import Columns
from onetrans.runtime.cache.lookup import CacheEntry, Lookup, look_up
from onetrans.runtime.cache.offload import OffloadFile
from onetrans.runtime.cache.state_cache import Lease, StateCache
from onetrans.runtime.model_version import ModelVersion, UserRequest
from onetrans.runtime.pools.base import StatePool
from onetrans.runtime.scores import Scores

log = logging.getLogger(__name__)

Action = Literal["prefill", "append", "reuse"]
Logits = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True, eq=False)
class RankingContext:
    """What batches are ranked with, the same for all of them until the model is reloaded.

    Attributes:
        version: The model.
        cache: Says which slot belongs to whom.
        pool: Holds the states.
        offload: Takes and gives back states that do not fit the pool; None for none.
        drift_is_due: Asked once per stale user: whether the drift is measured.
    """

    version: ModelVersion
    cache: StateCache
    pool: StatePool
    offload: OffloadFile | None
    drift_is_due: Callable[[], bool]


@dataclass(frozen=True, kw_only=True, eq=False)
class UserPlan:
    """What is to be done for one user.

    Attributes:
        row: The user's place in the batch.
        user: The request.
        lookup: What the cache has for it.
        action: `prefill` from all events in the window, `append` to the state, or `reuse` of the state as it is.
        source: Slot of the state found; None where there is none, or where it must be loaded first.
        target: Slot of the state that decode reads: the source's own, or another where the state is prefilled, loaded,
            or moved across an anchor.
        loads: Whether the state is read from the offload file into the target before anything else.
        drift_slot: Slot for the prefill that the drift is measured with; None where it is not measured. The target of a
            state that moved: its exact state takes its place.
    """

    row: int
    user: UserRequest
    lookup: Lookup
    action: Action
    source: int | None
    target: int
    loads: bool
    drift_slot: int | None

    @property
    def moves(self) -> bool:
        """Whether the state is copied to the target first, without the tokens that leave its windows."""
        return self.source is not None and self.source != self.target


def plan_user(row: int, user: UserRequest, lookup: Lookup, spare: int | None, *, checks_drift: bool) -> UserPlan:
    """Plans for one user.

    Args:
        row: The user's place in the batch.
        user: The request.
        lookup: What the cache has for it.
        spare: A slot to compute in, where `needs_slot`.
        checks_drift: Whether the drift is measured.
    """
    entry = lookup.entry
    source = None if entry is None or lookup.offloaded else entry.slot
    target = spare if source is None or any(lookup.dropped) else source
    assert target is not None
    return UserPlan(
        row=row,
        user=user,
        lookup=lookup,
        action="prefill" if entry is None else "append" if lookup.recompute else "reuse",
        source=source,
        target=target,
        loads=lookup.offloaded,
        drift_slot=spare if checks_drift else None,
    )


def needs_slot(lookup: Lookup, *, checks_drift: bool) -> bool:
    """Whether a user needs a slot to compute in, beside that of the state found."""
    return lookup.entry is None or lookup.offloaded or any(lookup.dropped) or checks_drift


class BatchRanking:
    """The ranking of one batch of users."""

    def __init__(self, context: RankingContext, users: Sequence[UserRequest]) -> None:
        """Puts the candidates together.

        Args:
            context: What to rank with.
            users: Different users, or users without a key.
        """
        self.context = context
        self.users = users
        self.candidates, self.counts = context.version.encoder.candidate_inputs([user.parsed for user in users])
        self.seconds: dict[str, float] = {}

    def run(self, seconds: Mapping[str, float]) -> list[Scores]:
        """Ranks. What was computed is kept as soon as it is whole, even if a later step fails.

        Args:
            seconds: Time spent so far per component.
        """
        self.seconds = dict(seconds)
        with self.context.cache.use([user.key for user in self.users if user.key is not None]) as lease:
            try:
                return self._rank(lease)
            finally:
                self._offload(lease)

    def _rank(self, lease: Lease) -> list[Scores]:
        plans = [self._load(lease, plan) if plan.loads else plan for plan in self._plan(lease)]
        prefills = [plan for plan in plans if plan.action == "prefill"]
        self._prefill(prefills)
        self._commit(lease, prefills)
        for plan in plans:
            if plan.source is not None and plan.moves:
                self.context.pool.copy(plan.source, plan.target, plan.lookup.dropped)
        appends = [plan for plan in plans if plan.action == "append"]
        self._append(appends)
        # Where the exact state is about to take a moved one's slot, the moved one is not kept.
        self._commit(lease, [plan for plan in appends if plan.drift_slot != plan.target])
        logits = self._decode("decode", plans, [plan.target for plan in plans])
        drift = {plan.row: self._measure_drift(lease, plan, logits) for plan in plans if plan.drift_slot is not None}
        return [
            Scores(
                logits={task: value[plan.row, : self.counts[plan.row]] for task, value in logits.items()},
                seconds=self.seconds,
                result=plan.lookup.kind,
                fresh=plan.lookup.fresh,
                drift=drift.get(plan.row),
            )
            for plan in plans
        ]

    def _plan(self, lease: Lease) -> list[UserPlan]:
        """Plans for everyone, with all the slots that they need together."""
        lookups = [self._look_up(lease, user) for user in self.users]
        checks = [lookup.kind == "stale" and not lookup.offloaded and self.context.drift_is_due() for lookup in lookups]
        needs = [needs_slot(lookup, checks_drift=check) for lookup, check in zip(lookups, checks, strict=True)]
        taken = iter(lease.take(sum(needs)))
        return [
            plan_user(row, user, lookup, next(taken) if need else None, checks_drift=check)
            for row, (user, lookup, need, check) in enumerate(zip(self.users, lookups, needs, checks, strict=True))
        ]

    def _look_up(self, lease: Lease, user: UserRequest) -> Lookup:
        policy, offload = self.context.version.policy, self.context.offload
        entry = None if user.key is None else lease.look(user.key)
        if entry is None and user.key is not None and offload is not None:
            on_disk = offload.look(user.key)
            if on_disk is not None and not self.context.cache.expired(on_disk):
                found = look_up(policy, on_disk, user.history, user.context)
                if found.entry is not None and not any(found.dropped):  # across an anchor no state is loaded
                    return dataclasses.replace(found, offloaded=True)
        return look_up(policy, entry, user.history, user.context)

    def _load(self, lease: Lease, plan: UserPlan) -> UserPlan:
        """Reads a state into its slot; the new plan goes on from there, or prefills where the disk failed."""
        user, entry, offload = plan.user, plan.lookup.entry, self.context.offload
        assert user.key is not None
        assert entry is not None
        assert offload is not None
        with self._timed("load"):
            state = offload.take(user.key)
            if state is None:
                lookup = look_up(self.context.version.policy, None, user.history, user.context)
                return plan_user(plan.row, user, lookup, plan.target, checks_drift=False)
            self.context.pool.write(plan.target, state)
        entry = dataclasses.replace(entry, slot=plan.target)
        lease.commit(user.key, entry, computed=False)
        lookup = dataclasses.replace(plan.lookup, entry=entry, offloaded=False)
        return plan_user(plan.row, user, lookup, None, checks_drift=False)

    def _prefill(self, plans: Sequence[UserPlan]) -> None:
        if plans:
            version = self.context.version
            with self._timed("prefill"):
                inputs = version.encoder.user_inputs([plan.user.parsed for plan in plans])
                version.backend.prefill(self.context.pool, [plan.target for plan in plans], inputs)

    def _append(self, plans: Sequence[UserPlan]) -> None:
        if plans:
            version = self.context.version
            with self._timed("append"):
                starts = [plan.user.parsed.length - plan.lookup.fresh for plan in plans]
                inputs = version.encoder.user_inputs([plan.user.parsed for plan in plans], starts)
                version.backend.append(self.context.pool, [plan.target for plan in plans], inputs)

    def _commit(self, lease: Lease, plans: Sequence[UserPlan]) -> None:
        for plan in plans:
            self._keep(lease, plan, plan.target, plan.lookup.crossings)
            if self.context.offload is not None and plan.user.key is not None:
                self.context.offload.forget(plan.user.key)  # an older one

    def _keep(self, lease: Lease, plan: UserPlan, slot: int, crossings: int) -> None:
        key, look = plan.user.key, plan.lookup
        if key is not None:
            context = plan.user.context
            entry = CacheEntry(slot=slot, tokens=look.tokens, events=look.events, context=context, crossings=crossings)
            lease.commit(key, entry)

    def _decode(self, component: str, plans: Sequence[UserPlan], slots: Sequence[int]) -> Logits:
        version, rows = self.context.version, [plan.row for plan in plans]
        with self._timed(component):
            profiles = version.encoder.profiles([plan.user.parsed for plan in plans])
            inputs: Columns = {name: value[rows] for name, value in self.candidates.items()} | profiles
            return version.backend.decode(self.context.pool, slots, inputs, self.counts[rows])

    def _measure_drift(self, lease: Lease, plan: UserPlan, stale: Logits) -> float:
        """Prefills a stale user as well; the exact state takes the place of the stale one."""
        version, slot = self.context.version, plan.drift_slot
        assert slot is not None
        with self._timed("drift"):
            version.backend.prefill(self.context.pool, [slot], version.encoder.user_inputs([plan.user.parsed]))
        self._keep(lease, plan, slot, crossings=0)
        exact = self._decode("drift", [plan], [slot])
        count = int(self.counts[plan.row])
        return max(float(np.abs(exact[task][0, :count] - stale[task][plan.row, :count]).max()) for task in exact)

    def _offload(self, lease: Lease) -> None:
        """Saves what this batch drove out of the memory, after the scores are known or a step has failed."""
        offload = self.context.offload
        if offload is not None and lease.evicted:
            with self._timed("offload"):
                for key, entry in lease.evicted:
                    try:
                        offload.put(key, entry, self.context.pool.read(entry.slot))
                    except Exception as error:  # a state that is lost costs a prefill, not this request
                        log.warning("a state could not be offloaded: %s", error)

    @contextmanager
    def _timed(self, component: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[component] = self.seconds.get(component, 0.0) + time.perf_counter() - began
