"""Thousands of steps of users who grow, shrink, change, leave and return: every score is the reference's."""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from onetrans.features.requests import Request
from onetrans.model.onetrans import OneTrans
from onetrans.model.presets import preset
from onetrans.runtime import Scores
from onetrans.runtime.backends.base import Backend, BackendOptions
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.cache.lookup import KINDS
from onetrans.runtime.targets import open_backend
from parity_tests.states import Reference, cached, people, rank, same_bits, upto

CHUNK = preset("tiny").append_chunk
MOST = 4 * CHUNK + 40  # events: beyond max_history by several anchors
USERS = [f"user{n}" for n in range(12)]
SLOTS, WORKING, CAPACITY = 12, 3, 9  # three users more than there is room for
TTL = 100.0
EXAMPLES, STEPS = 80, 50
LEAST_STEPS = 2_500  # thousands; how many a run makes is for hypothesis to say: 3,883 and 4,129 were seen

whom = st.sampled_from(USERS)
counts = st.integers(1, 3)


@dataclasses.dataclass(frozen=True)
class Known:
    """What a user's state should have been computed from, and when."""

    events: tuple[tuple[int, float], ...]
    profile: str
    stored: float

    @classmethod
    def of(cls, request: Request, now: float) -> Known:
        history = cast(dict[str, Any], request.history)
        events = zip(np.asarray(history["item_id"]).tolist(), np.asarray(history["price"]).tolist(), strict=True)
        return cls(tuple(events), repr(request.profile), now)

    def kind(self, old: Known | None) -> str:
        """The result of a lookup that finds `old`."""
        if old is None or self.events[: len(old.events)] != old.events:
            return "prefill"
        if self.events == old.events and (self.events or self.profile == old.profile):
            return "reuse"
        return "append" if old.events and len(old.events) // CHUNK == len(self.events) // CHUNK else "prefill"


class Model:
    """The cache as it is documented, without states: what each request finds, and who has to go."""

    def __init__(self) -> None:
        self.known: OrderedDict[str, Known] = OrderedDict()
        self.evicted = 0

    def expire(self, now: float) -> int:
        old = [user for user, known in self.known.items() if now - known.stored > TTL]
        return sum(self.known.pop(user) is not None for user in old)

    def rank(self, requests: Sequence[Request], now: float) -> list[str]:
        """The results, pass by pass of WORKING users."""
        kinds: list[str] = []
        for first in range(0, len(requests), WORKING):
            kinds += self._pass(requests[first : first + WORKING], now)
        return kinds

    def _pass(self, requests: Sequence[Request], now: float) -> list[str]:
        made = {request.user: Known.of(request, now) for request in requests}
        found: dict[str, Known | None] = {}
        for user in filter(None, made):
            if user in self.known and now - self.known[user].stored > TTL:
                del self.known[user]
            if user in self.known:
                self.known.move_to_end(user)
            found[user] = self.known.get(user)
        kinds = {user: known.kind(found.get(user)) for user, known in made.items()}
        fresh = [user for user in found if kinds[user] == "prefill"]
        renewed = [user for user in found if user not in fresh and differ(found[user], made[user])]
        for user in (*fresh, *renewed):
            if user not in self.known and len(self.known) == CAPACITY:
                del self.known[next(other for other in self.known if other not in made)]
                self.evicted += 1
            self.known[user] = made[user]
            self.known.move_to_end(user)
        return [kinds[request.user] for request in requests]


def differ(old: Known | None, new: Known) -> bool:
    return old is None or (old.events, old.profile) != (new.events, new.profile)


class Users(RuleBasedStateMachine):
    """A cached Ranker, users who do what they do, and the reference that remembers nothing."""

    bundle: ClassVar[Bundle]
    backend: ClassVar[Backend]
    reference: ClassVar[Reference]
    tally: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.ranker, self.pool = cached(self.bundle, self.backend, slots=SLOTS, compute_slots=WORKING, ttl=TTL)
        assert (self.ranker.cache.compute_slots, self.ranker.cache.capacity) == (WORKING, CAPACITY)
        self.now = 0.0
        self.ranker.cache.clock = lambda: self.now
        self.model = Model()
        self.lives = people(self.bundle.manifest.schema, USERS, events=MOST)
        self.events = dict.fromkeys(USERS, 0)
        self.alone: dict[str, tuple[Request, int, int, Scores]] = {}  # the last result of a user ranked alone
        self.addresses = {name: slab.ctypes.data for name, slab in self.pool.slabs.items()}

    def request(self, user: str, candidates: int) -> Request:
        return upto(self.lives[user], self.events[user], candidates)

    def grow(self, user: str, events: int) -> None:
        self.events[user] = min(MOST, self.events[user] + events)

    def change(self, user: str, part: str, name: str, value: Any) -> None:
        self.lives[user] = dataclasses.replace(
            self.lives[user], **{part: {**getattr(self.lives[user], part), name: value}}
        )

    def judge(self, requests: Sequence[Request], found: Sequence[Scores]) -> None:
        kinds = self.model.rank(requests, self.now)
        assert [scores.result for scores in found] == kinds
        for request, scores in zip(requests, found, strict=True):
            assert scores.drift is None
            self.reference.check_request(scores, request)
        self.tally.update(["steps", *kinds])

    def alone_now(self, user: str, candidates: int) -> None:
        before = self.model.known.get(user)
        request = self.request(user, candidates)
        scores = rank(self.ranker, request)
        self.judge([request], [scores])
        after = self.model.known[user]
        if before is not None and len(after.events) // CHUNK > len(before.events) // CHUNK:
            self.tally["crossings"] += after.events[: len(before.events)] == before.events
        this = (self.lives[user], self.events[user], candidates)
        if before is not None and before.stored == after.stored and self.alone.get(user, ())[:3] == this:
            assert same_bits(scores.logits, self.alone[user][3].logits)
            self.tally["bit-equal"] += 1
        self.alone[user] = (*this, scores)

    @rule(user=whom, events=st.integers(0, 12), candidates=counts)
    def grows(self, user: str, events: int, candidates: int) -> None:
        self.grow(user, events)
        self.alone_now(user, candidates)

    @rule(user=whom, beyond=st.integers(-1, 2), candidates=counts)
    def comes_to_an_anchor(self, user: str, beyond: int, candidates: int) -> None:
        self.grow(user, CHUNK - self.events[user] % CHUNK + beyond)
        self.alone_now(user, candidates)

    @rule(user=whom, events=st.integers(0, MOST), candidates=counts)
    def has_another_length(self, user: str, events: int, candidates: int) -> None:
        self.events[user] = events
        self.alone_now(user, candidates)

    @rule(user=whom, back=st.integers(1, 70), name=st.sampled_from(["item_id", "price"]), candidates=counts)
    def has_another_past(self, user: str, back: int, name: str, candidates: int) -> None:
        column = np.array(cast(dict[str, Any], self.lives[user].history)[name])
        index = max(0, self.events[user] - back)
        column[index] = (column[index] + 1) % 2001
        self.change(user, "history", name, column)
        self.alone_now(user, candidates)

    @rule(user=whom, hour=st.integers(0, 24), days=st.integers(-3, 3), events=st.integers(0, 2), candidates=counts)
    def has_another_context(self, user: str, hour: int, days: int, events: int, candidates: int) -> None:
        self.change(user, "profile", "hour", hour)
        self.change(user, "profile", "days_active", days / 2)
        self.grow(user, events)
        self.alone_now(user, candidates)

    @rule(user=whom, seconds=st.integers(1, 10**6), candidates=counts)
    def has_other_clocks(self, user: str, seconds: int, candidates: int) -> None:
        times = np.asarray(cast(dict[str, Any], self.lives[user].history)["timestamp"])
        self.change(user, "history", "timestamp", times + seconds)
        self.alone_now(user, candidates)

    @rule(user=whom, candidates=counts)
    def comes_back(self, user: str, candidates: int) -> None:
        for _ in range(2):
            self.alone_now(user, candidates)

    @rule(
        users=st.lists(whom, min_size=1, max_size=4, unique=True),
        events=st.lists(st.integers(0, 40), min_size=4, max_size=4),
        candidates=st.lists(counts, min_size=5, max_size=5),
        unnamed=st.booleans(),
    )
    def come_together(self, users: list[str], events: list[int], candidates: list[int], unnamed: bool) -> None:
        for user, more in zip(users, events, strict=False):
            self.grow(user, more)
        requests = [self.request(user, count) for user, count in zip(users, candidates, strict=False)]
        if unnamed:
            requests.insert(1, dataclasses.replace(requests[0], user=""))
        self.judge(requests, self.ranker.rank_batch(requests))
        for user in users:
            self.alone.pop(user, None)

    @rule(candidates=counts)
    def come_the_forgotten(self, candidates: int) -> None:
        forgotten = [user for user in USERS if user not in self.model.known][:2]
        requests = [self.request(user, candidates) for user in forgotten]
        self.judge(requests, self.ranker.rank_batch(requests))

    @rule(user=whom)
    def is_invalidated(self, user: str) -> None:
        assert self.ranker.invalidate(user) == (self.model.known.pop(user, None) is not None)
        self.tally["steps"] += 1

    @rule(seconds=st.integers(1, 60), expire=st.booleans())
    def time_passes(self, seconds: int, expire: bool) -> None:
        self.now += seconds
        if expire:
            assert self.ranker.cache.expire() == self.model.expire(self.now)
        self.tally["steps"] += 1

    @invariant()
    def everything_is_in_its_place(self) -> None:
        self.ranker.check_integrity()
        entries = self.ranker.cache.entries()
        assert [user for _, user in entries] == list(self.model.known)
        assert all(entry.tokens == len(self.model.known[user].events) for (_, user), entry in entries.items())
        assert {name: slab.ctypes.data for name, slab in self.pool.slabs.items()} == self.addresses
        assert self.ranker.cache.counts["evicted"] == self.model.evicted

    def teardown(self) -> None:
        self.tally.update(self.ranker.cache.counts)


@pytest.mark.slow
def test_every_score_is_the_references_and_every_lookup_as_documented(tiny_model: OneTrans, tiny_bundle: Any) -> None:
    Users.bundle = Bundle.open(tiny_bundle)
    Users.backend = open_backend(Users.bundle, options=BackendOptions(threads=1))
    Users.reference = reference = Reference(tiny_model)
    Users.tally.clear()
    run_state_machine_as_test(
        Users,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            derandomize=True,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            phases=[Phase.explicit, Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
    tally = Users.tally
    print(f"{dict(tally)}; at most {reference.worst:.1e} off, plain PyTorch {reference.error:.1e}")
    assert tally["steps"] >= LEAST_STEPS
    for what in ("reuse", "append", "prefill", "crossings", "bit-equal", "evicted", "expired", "invalidated"):
        assert tally[what] >= LEAST_STEPS // 100, what
    assert set(tally) & {*KINDS} == {"reuse", "append", "prefill"}
