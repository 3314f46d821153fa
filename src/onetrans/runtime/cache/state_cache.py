"""Who holds which slot: keyed by model version and user, least recently used out first, in-use ones pinned.

Deals in slot numbers alone; what is in the slots is for the backend and the Ranker. So the sizing model replays
requests against this very class without a backend.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from onetrans.errors import ConfigError, StateError
from onetrans.runtime.cache.lookup import CacheEntry

Key = tuple[str, str]  # model version, user


class StateCache:
    """A fixed number of slots, of which some are kept free for states being computed.

    A user's requests run one after another, those of different users side by side. A prefill goes into a slot of its
    own and takes the place of the user's old state once it has succeeded, so a failure leaves the cache as it was.
    """

    def __init__(
        self,
        slots: int,
        *,
        compute_slots: int,
        ttl: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        keeps_evicted: bool = False,
    ) -> None:
        """Makes an empty cache.

        Args:
            slots: All that there are.
            compute_slots: Slots kept free for states being computed; at least 1.
            ttl: Seconds after which a state is no longer used, counted from when it was computed; None for no limit.
            clock: Gives the time in seconds.
            keeps_evicted: Whether the slot of a state that must go stays with the lease that drove it out, in
                `Lease.evicted`, so that its content can be saved.

        Raises:
            ConfigError: The numbers leave no slot to compute in, or no time.
        """
        if not 1 <= compute_slots <= slots:
            raise ConfigError(
                f"compute_slots is {compute_slots}; of {slots} slots, 1 to {slots} can be kept to compute in"
            )
        if ttl is not None and not ttl > 0:
            raise ConfigError(f"ttl is {ttl}; give seconds above 0, or none for no limit")
        self.slots, self.compute_slots, self.capacity = slots, compute_slots, slots - compute_slots
        self.ttl, self.clock, self.keeps_evicted = ttl, clock, keeps_evicted
        self.counts: Counter[str] = Counter()  # evicted, expired, invalidated, turned_away
        self._entries: OrderedDict[Key, CacheEntry] = OrderedDict()
        self._free = list(reversed(range(slots)))
        self._leased: set[int] = set()
        self._busy: set[Key] = set()
        self._waiting: list[set[Key]] = []
        self._queue: list[object] = []
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._entries)

    @contextmanager
    def use(self, keys: Sequence[Key]) -> Iterator[Lease]:
        """Locks some users' states until the end of the block; waits while another caller has one of them.

        All are taken at once, so two callers never wait for each other; in the order of arrival, so none waits forever.
        """
        wanted = set(keys)
        with self._changed:
            self._waiting.append(wanted)
            try:
                self._changed.wait_for(lambda: not wanted & self._busy and not self._before(wanted))
                self._busy |= wanted
            finally:
                _remove(self._waiting, wanted)
                self._changed.notify_all()
        lease = Lease(self, wanted)
        try:
            yield lease
        finally:
            with self._changed:
                self._busy -= wanted
                self._leased -= lease.slots
                self._free.extend(lease.slots)
                self._changed.notify_all()

    def invalidate(self, key: Key) -> bool:
        """Forgets a user's state, after the request that uses it now; whether there was one."""
        with self.use([key]) as lease:
            return lease.forget(key)

    def clear(self, keep: Callable[[Key], bool] = lambda key: False) -> int:
        """Forgets every state that no request uses now and that is not to be kept; how many."""
        with self._changed:
            idle = [key for key in self._entries if key not in self._busy and not keep(key)]
            return sum(self._forget(key, "invalidated") for key in idle)

    def expire(self) -> int:
        """Forgets every state past its time that no request uses now; how many. A lookup forgets its own user's."""
        with self._changed:
            idle = [key for key, entry in self._entries.items() if key not in self._busy and self.expired(entry)]
            return sum(self._forget(key, "expired") for key in idle)

    def entries(self) -> dict[Key, CacheEntry]:
        """Lists what is cached now, least recently used first."""
        with self._changed:
            return dict(self._entries)

    def visit(self, check: Callable[[Key, CacheEntry], None]) -> None:
        """Calls `check` with every state that no request uses now; they stand still meanwhile."""
        with self._changed:
            for key, entry in self._entries.items():
                if key not in self._busy:
                    check(key, entry)

    def check_integrity(self) -> None:
        """Checks that every slot is free, cached or leased, and is so once; may be called at any moment.

        Raises:
            StateError: It is not so.
        """
        with self._changed:
            cached = [entry.slot for entry in self._entries.values()]
            everywhere = sorted([*cached, *self._free, *self._leased])
            if everywhere != list(range(self.slots)):
                raise StateError(
                    f"the state cache is broken: {len(cached)} cached, {len(self._free)} free and {len(self._leased)}"
                    f" leased slots are not the {self.slots} there are, each once"
                )
            if len(cached) > self.capacity or len(self._leased) > self.compute_slots:
                raise StateError(
                    f"the state cache is broken: {len(cached)} states are cached where {self.capacity} fit, and"
                    f" {len(self._leased)} slots are leased where {self.compute_slots} are kept for that"
                )

    def expired(self, entry: CacheEntry) -> bool:
        """Whether a state's time is over."""
        return self.ttl is not None and self.clock() - entry.stored > self.ttl

    def _before(self, wanted: set[Key]) -> bool:
        """Whether someone who came earlier waits for one of these users."""
        return any(earlier & wanted for earlier in itertools.takewhile(lambda w: w is not wanted, self._waiting))

    def _forget(self, key: Key, why: str) -> bool:
        with self._changed:
            entry = self._entries.pop(key, None)
            if entry is None:
                return False
            self._free.append(entry.slot)
            self.counts[why] += 1
            return True

    def _look(self, key: Key) -> CacheEntry | None:
        with self._changed:
            entry = self._entries.get(key)
            if entry is None:
                return None
            if self.expired(entry):
                self._forget(key, "expired")
                return None
            self._entries.move_to_end(key)
            return entry

    def _take(self, count: int) -> list[int]:
        turn = object()
        with self._changed:
            self._queue.append(turn)
            try:  # in turn, since one who needs many would wait forever behind those who need one
                self._changed.wait_for(
                    lambda: self._queue[0] is turn and len(self._leased) + count <= self.compute_slots
                )
                taken = [self._free.pop() for _ in range(count)]
                self._leased.update(taken)
            finally:
                _remove(self._queue, turn)
                self._changed.notify_all()
            return taken

    def _commit(self, lease: Lease, key: Key, entry: CacheEntry) -> bool:
        with self._changed:
            old = self._entries.get(key)
            if old is None and len(self._entries) >= self.capacity:
                victim = next((k for k in self._entries if k not in self._busy), None)
                if victim is None:
                    self.counts["turned_away"] += 1
                    return False
                if self.keeps_evicted:
                    gone = self._entries.pop(victim)
                    lease.evicted.append((victim, gone))
                    lease.slots.add(gone.slot)
                    self._leased.add(gone.slot)
                    lease.keys.add(victim)  # until it is saved, nobody else has its user
                    self._busy.add(victim)
                    self.counts["evicted"] += 1
                else:
                    self._forget(victim, "evicted")
            if old is not None and old.slot != entry.slot:
                self._free.append(old.slot)
            self._entries[key] = entry
            self._entries.move_to_end(key)
            self._leased.discard(entry.slot)
            lease.slots.discard(entry.slot)
            self._changed.notify_all()
            return True


def _remove(waiting: list[Any], one: object) -> None:
    """Takes out that very object; another may be equal to it."""
    del waiting[next(index for index, other in enumerate(waiting) if other is one)]


class Lease:
    """The states of some users, and slots to compute in, for the time of one call."""

    def __init__(self, cache: StateCache, keys: set[Key]) -> None:
        self._cache = cache
        self.keys = keys
        self.slots: set[int] = set()
        self.evicted: list[tuple[Key, CacheEntry]] = []

    def look(self, key: Key) -> CacheEntry | None:
        """Finds the user's state, unless its time is over; it becomes the most recently used."""
        assert key in self.keys
        return self._cache._look(key)

    def forget(self, key: Key) -> bool:
        """Forgets the user's state; whether there was one."""
        assert key in self.keys
        return self._cache._forget(key, "invalidated")

    def take(self, count: int) -> list[int]:
        """Takes slots to compute in, all at once and only once per lease; waits for those who have them now.

        They are given back at the end of the lease, unless committed.
        """
        assert not self.slots, "a second call could wait for another caller's second call"
        taken = self._cache._take(count) if count else []
        self.slots.update(taken)
        return taken

    def commit(self, key: Key, entry: CacheEntry, *, computed: bool = True) -> bool:
        """Makes what a slot holds the user's state, in the place of an older one or of the least recently used.

        Args:
            key: The user.
            entry: What the slot holds.
            computed: Whether it was computed now; else it keeps its age.

        Returns:
            False where every cached state is in use; the slot is then given back at the end of the lease.
        """
        assert key in self.keys
        if computed:
            entry = dataclasses.replace(entry, stored=self._cache.clock())
        return self._cache._commit(self, key, entry)
