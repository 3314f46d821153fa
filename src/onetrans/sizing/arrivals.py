"""Which user asks when, and with how many new events: the arrival model of `onetrans plan` (docs/sizing.md)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from onetrans.errors import ConfigError

RANKS = 1_000_000  # by whose sum the gaps are scaled; ten million users then make 1e-5 too many requests

MOST_USERS = 20_000_000  # of one trace: 2 GB of arrays
BOUNDS = {
    "users": (1, 1e12),
    "qps": (1e-6, 1e9),
    "events_mean": (0, 1e6),
    "zipf": (0, 4),
    "session_requests": (1, 1e6),
    "request_gap": (1e-3, 1e6),
    "request_events": (0, 1e4),
    "return_events": (0, 1e4),
    "context_seconds": (1e-3, 1e12),
    "seed": (0, 2**63),
}

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in the order of time.

    Attributes:
        time: Seconds [R]; those before 0 are the past, of which nothing is counted.
        user: From 0 [R].
        tokens: S-tokens of the user's history [R].
        fresh: Tokens of these that are new since the user's last request [R]; 0 where the trace knows no earlier one.
        context: Names profile and context [R].
    """

    time: Floats
    user: Integers
    tokens: Integers
    fresh: Integers
    context: Integers

    @property
    def past(self) -> int:
        """Requests before time 0."""
        return int(np.searchsorted(self.time, 0))

    def part(self, where: slice | NDArray[np.bool_]) -> Trace:
        """Some of the requests."""
        return Trace(self.time[where], self.user[where], self.tokens[where], self.fresh[where], self.context[where])


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """A population of users and what they ask.

    The gap from one of a user's requests to the next is `request_gap` within a session and longer between sessions,
    each exponential; after a request the session ends with probability 1 / `session_requests`. The user of rank k
    returns after a mean gap of request_gap + scale * k ** zipf, where `scale` is such that all users together make
    `qps`.

    Attributes:
        users: Among whom the requests spread.
        qps: Requests per second of all of them.
        events_mean: Mean history length at the start, in events; lengths are exponential, so that there are newcomers
            as well as very long histories.
        zipf: Exponent of the users' activity; 0 makes all alike. At 0.86 a fifth of a million users makes seven
            tenths of 100 requests per second, and less the nearer the busiest come to one per `request_gap`.
        session_requests: Mean requests of a session, geometric: a feed read for some pages.
        request_gap: Mean seconds between the requests of a session: the time that a page is looked at.
        request_events: Mean new events between two requests of a session, Poisson: every second page is acted upon.
        return_events: Mean new events between two sessions, Poisson: those made elsewhere, as in search.
        context_seconds: For how long profile and context stand still: the presets' context is the hour. Where every
            request has another one, 0.001.
        seed: Seed of all that is drawn.
    """

    users: int
    qps: float
    events_mean: float
    zipf: float = 0.86
    session_requests: float = 10.0
    request_gap: float = 30.0
    request_events: float = 0.5
    return_events: float = 2.0
    context_seconds: float = 3600.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name} is {value}; it must be {low:g} to {high:g}")
        most = self.users / self.request_gap
        if self.qps >= most:
            raise ConfigError(
                f"qps is {self.qps:g}, but {self.users} users make fewer than {most:.4g} requests per second, one every"
                f" {self.request_gap:g} s each; give fewer, more users or a shorter request_gap"
            )

    @cached_property
    def scale(self) -> float:
        """Seconds by which the mean return gap of the busiest user is longer than the gap within a session."""
        weights = self._ranks(min(self.users, RANKS)) ** self.zipf / self.session_requests
        wanted = self.qps / self.users * len(weights)
        low, high = 0.0, float((1 / weights).sum()) / wanted  # the answer, were there no gap within sessions
        for _ in range(60):
            scale = (low + high) / 2
            found = (1 / (self.request_gap + scale * weights)).sum()
            low, high = (scale, high) if found > wanted else (low, scale)
        return high

    def return_gap(self, rank: int) -> float:
        """Mean seconds from one session to the next of the user of that rank, 1 to `users`."""
        return float(self.request_gap + self.scale * rank**self.zipf)

    def draw(self, *, users: int, requests: int) -> Trace:
        """Draws requests of some of the users, taken evenly from all ranks, as hashing users to machines does.

        The trace begins with one past request of every user, the last before time 0. So a cache of the least recently
        used states stands at time 0 as after a long run: who is in it depends on nothing earlier.

        Args:
            users: How many, 1 to all.
            requests: After time 0, about: what is fixed is the time in which these users make so many.

        Raises:
            ConfigError: More users than `MOST_USERS`.
        """
        if users > MOST_USERS:
            raise ConfigError(f"{users} users of one machine are too many to replay; at most {MOST_USERS} are drawn")
        rng = np.random.default_rng(self.seed)
        returns = self.request_gap + self.scale * self._ranks(users) ** self.zipf
        ends = 1 / self.session_requests
        between = ends * returns / (ends * returns + (1 - ends) * self.request_gap)
        returning = rng.random(users) < between  # whether time 0 falls between two sessions
        # Gaps are exponential: what has passed of one and what is left of it are so too, and independent.
        mean = np.where(returning, returns, self.request_gap)
        time, user = rng.exponential(mean), np.arange(users)
        times, who, after_return = [-rng.exponential(mean)], [user], [returning]
        end = requests / (self.qps * users / self.users)
        while (inside := time < end).any():
            time, user, returning = time[inside], user[inside], returning[inside]
            times.append(time)
            who.append(user)
            after_return.append(returning)
            returning = rng.random(len(user)) < ends
            time = time + rng.exponential(np.where(returning, returns[user], self.request_gap))
        events = np.where(np.concatenate(after_return), self.return_events, self.request_events)
        events[:users] = 0  # before the past request: part of the history's length
        return self._with_histories(rng, np.concatenate(times), np.concatenate(who), rng.poisson(events))

    def _with_histories(self, rng: np.random.Generator, time: Floats, user: Integers, fresh: Integers) -> Trace:
        """Sorts requests [R] by time and gives each its history; `fresh` is 0 in every user's first."""
        length = np.rint(rng.exponential(self.events_mean, int(user.max()) + 1)).astype(np.int64)
        grouped = np.lexsort((time, user))
        total = np.cumsum(fresh[grouped])
        firsts = np.searchsorted(user[grouped], np.arange(len(length)))
        tokens = np.empty_like(total)
        tokens[grouped] = total + (length - total[firsts])[user[grouped]]
        order = np.argsort(time, kind="stable")
        context = np.floor(time[order] / self.context_seconds).astype(np.int64)
        return Trace(time[order], user[order], tokens[order], fresh[order], context)

    def _ranks(self, count: int) -> Floats:
        """Ranks [count] of users taken evenly; all of them, from 1, where `count` is `users`."""
        return (np.arange(count) + 0.5) * self.users / count + 0.5
