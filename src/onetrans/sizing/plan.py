"""How many machines serve a load, and what limits them: arrivals replayed against the cache policy of the runtime."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from onetrans.errors import ConfigError
from onetrans.runtime.cache.config import CacheConfig
from onetrans.runtime.cache.lookup import CacheEntry, Kind, Policy, look_up
from onetrans.runtime.cache.state_cache import StateCache
from onetrans.runtime.manifest import Manifest
from onetrans.sizing.arrivals import Arrivals, Trace
from onetrans.sizing.costs import Costs

PLANNED: tuple[Kind, ...] = ("reuse", "append", "prefill")
REQUESTS = 50_000  # shares are then good to about half a percentage point
LEAST_REQUESTS, MOST_REQUESTS = 1000, 10_000_000
SAVING = 0.05  # of a machine's time by unlimited memory; from here on memory is called the limit


@dataclass(frozen=True)
class CountedHistory:
    """A history that only ever grows, so that the count of its tokens tells which they are."""

    tokens: int

    def digests(self, count: int) -> tuple[bytes, bytes]:
        """Stands for the first `count` tokens, and for all of them."""
        return b"%d" % count, b"%d" % self.tokens


@dataclass(frozen=True, eq=False)
class Replay:
    """What the cache did with the requests of a trace.

    Attributes:
        past: Requests before time 0; they come first.
        kinds: Lookup kind of every request [R], the past among them.
        computed: Events computed [R]: the whole window of a prefill, the new ones of an append.
        renewed: Whether the append graph ran [R]: new events on a state, or another profile or context.
        counts: What else the cache did (`evicted`, `expired`) from time 0 on.
        cached: Users that it held in the end.
    """

    past: int
    kinds: list[Kind]
    computed: NDArray[np.int64]
    renewed: NDArray[np.bool_]
    counts: Counter[str]
    cached: int


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One machine under its share of the load.

    Attributes:
        state_memory: Bytes for states.
        capacity: Users that fit, beside those being computed.
        cached: Users cached in the end.
        bytes_cached: Their states.
        requests: That were counted.
        shares: Share of each lookup kind among them.
        renewed: Share of requests that ran the append graph: `append`, and `reuse` with another profile or context.
        events: Events computed per request.
        evicted: States per request that left for another user's.
        expired: States per request that were too old.
        milliseconds: Per request, all parts together.
        utilisation: Share of the time that the machine works.
    """

    state_memory: int
    capacity: int
    cached: int
    bytes_cached: int
    requests: int
    shares: Mapping[Kind, float]
    renewed: float
    events: float
    evicted: float
    expired: float
    milliseconds: float
    utilisation: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the load needs.

    Attributes:
        machines: The fewest that stay within the utilisation.
        users_per_machine: Each machine's share of the users.
        bytes_per_user: Bytes of a state.
        costs: That were reckoned with.
        at: A machine with the memory that was asked about.
        half: The same machine with half of it; None where that holds no two users.
        double: With twice as much.
        unlimited: With room for all its users.
        saving: Share of a machine's time that this room would save.
        limit: `memory` where that is `SAVING` or more, else `compute`.
    """

    machines: int
    users_per_machine: int
    bytes_per_user: int
    costs: Costs
    at: Machine
    half: Machine | None
    double: Machine
    unlimited: Machine
    saving: float
    limit: Literal["compute", "memory"]


def replay(trace: Trace, manifest: Manifest, config: CacheConfig) -> Replay:
    """Runs a trace through the lookup and the cache of `Ranker.rank`, one request after another, scores left out.

    Args:
        trace: Requests.
        manifest: The bundle's manifest.
        config: The cache's configuration; exact reuse and no offload file.

    Raises:
        ConfigError: The memory does not hold two users.
    """
    assert config.reuse == "exact"
    assert config.offload is None
    policy = Policy(pyramid=manifest.pyramid, can_append="append" in manifest.graphs)
    slots, compute_slots = config.slots(manifest.bytes_per_user)
    now = 0.0
    cache = StateCache(slots, compute_slots=compute_slots, ttl=config.ttl, clock=lambda: now)
    before: Counter[str] = Counter()
    past = trace.past
    kinds: list[Kind] = []
    computed: list[int] = []
    renewed: list[bool] = []
    columns = (trace.time, trace.user, trace.tokens, trace.context)
    for index, (moment, user, tokens, context) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        now = moment
        if index == past:
            before = cache.counts.copy()
        key, digest = ("", str(user)), b"%d" % context
        with cache.use([key]) as lease:
            found = look_up(policy, lease.look(key), CountedHistory(tokens), digest)
            slot = found.entry.slot if found.entry else lease.take(1)[0]
            if found.recompute:
                lease.commit(key, CacheEntry(slot=slot, tokens=tokens, events=found.events, context=digest))
        kinds.append(found.kind)
        computed.append(found.fresh if found.entry else tokens - policy.pyramid.starts(tokens)[0])
        renewed.append(found.entry is not None and found.recompute)
    cache.check_integrity()
    counts = cache.counts - before
    return Replay(past, kinds, np.array(computed), np.array(renewed), counts, len(cache))


def make_plan(
    manifest: Manifest,
    arrivals: Arrivals,
    config: CacheConfig,
    costs: Costs,
    *,
    requests: int,
    utilisation: float,
    progress: Callable[[str], None] = lambda stage: None,
) -> Plan:
    """Finds the fewest machines for a load.

    A machine is one process that ranks one request after another and has `config.state_memory` bytes for states. Users
    are hashed to machines, so with more machines each has fewer users for the same memory. Needed are

        ceil(qps * milliseconds per request / 1000 / utilisation)
        milliseconds per request = decode + share of prefill * prefill + share of renewed * append

    and the shares are those of a machine's replay; so the fewest machines M are sought that need at most M.

    Args:
        manifest: The bundle's manifest.
        arrivals: The load.
        config: Configuration of the cache of one machine.
        costs: Milliseconds of a request's parts on such a machine.
        requests: To replay for one machine, about.
        utilisation: Share of its time that a machine may work: above 0, at most 1.
        progress: Told each stage.

    Raises:
        ConfigError: The memory does not hold two users, or a number is out of bounds.
    """
    if not LEAST_REQUESTS <= requests <= MOST_REQUESTS:
        raise ConfigError(f"requests is {requests}; it must be {LEAST_REQUESTS} to {MOST_REQUESTS}")
    if not 0 < utilisation <= 1:
        raise ConfigError(f"utilisation is {utilisation}; it must be above 0 and at most 1")

    def needed(milliseconds: float) -> int:
        return math.ceil(arrivals.qps * milliseconds / 1000 / utilisation)

    def share(machines: int) -> Trace:
        return arrivals.draw(users=max(1, round(arrivals.users / machines)), requests=requests)

    low, high = needed(costs.decode), needed(costs.decode + max(costs.prefill, costs.append))
    while low < high:
        machines = (low + high) // 2
        progress(f"replaying one of {machines} machines; {low} to {high} are needed")
        need = needed(_machine(share(machines), manifest, config, costs, arrivals.qps / machines).milliseconds)
        # More machines have more memory for each user, and so need no more time: `need` bounds from both sides.
        low, high = (max(low, need), machines) if need <= machines else (machines + 1, min(high, need))
    trace = share(high)

    def with_memory(memory: int) -> Machine:
        progress(f"replaying one of {high} machines with {memory:,} bytes for states")
        changed = dataclasses.replace(config, state_memory=memory)
        return _machine(trace, manifest, changed, costs, arrivals.qps / high)

    memory, users = config.state_memory, int(trace.user.max()) + 1
    at, double = with_memory(memory), with_memory(2 * memory)
    unlimited = with_memory((users + config.compute_slots) * manifest.bytes_per_user)
    saving = 1 - unlimited.milliseconds / at.milliseconds
    return Plan(
        machines=high,
        users_per_machine=users,
        bytes_per_user=manifest.bytes_per_user,
        costs=costs,
        at=at,
        half=with_memory(memory // 2) if memory >= 4 * manifest.bytes_per_user else None,
        double=double,
        unlimited=unlimited,
        saving=saving,
        limit="memory" if saving >= SAVING else "compute",
    )


def _machine(trace: Trace, manifest: Manifest, config: CacheConfig, costs: Costs, qps: float) -> Machine:
    slots, compute_slots = config.slots(manifest.bytes_per_user)
    capacity = slots - compute_slots
    users = int(trace.user.max()) + 1
    if capacity < users:  # of the past, only as many users as fit can be cached still
        trace = trace.part(slice(max(0, trace.past - capacity), None))
        found = replay(trace, manifest, config)
        cached = found.cached
    else:  # nobody is evicted, so users who do not come need not be replayed
        come = np.zeros(users, bool)
        come[trace.user[trace.past :]] = True
        room = (int(come.sum()) + config.compute_slots) * manifest.bytes_per_user
        found = replay(trace.part(come[trace.user]), manifest, dataclasses.replace(config, state_memory=room))
        cached = users
    kinds = found.kinds[found.past :]
    if not kinds:
        raise ConfigError("no request fell into the replay; give more requests, or fewer in a session")
    shares = {kind: kinds.count(kind) / len(kinds) for kind in PLANNED}
    renewed = float(found.renewed[found.past :].mean())
    milliseconds = costs.decode + shares["prefill"] * costs.prefill + renewed * costs.append
    return Machine(
        state_memory=config.state_memory,
        capacity=capacity,
        cached=cached,
        bytes_cached=cached * manifest.bytes_per_user,
        requests=len(kinds),
        shares=shares,
        renewed=renewed,
        events=float(found.computed[found.past :].mean()),
        evicted=found.counts["evicted"] / len(kinds),
        expired=found.counts["expired"] / len(kinds),
        milliseconds=milliseconds,
        utilisation=qps * milliseconds / 1000,
    )
