"""What a cached state is good for: reuse, append, prefill, or, only where asked for, stale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from onetrans.features.windows import Pyramid

Kind = Literal["reuse", "append", "prefill", "stale"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Reuse = Literal["exact", "stale"]
STALE_CROSSINGS = 4


class HistoryHash(Protocol):
    """A history as the lookup needs it: `onetrans.runtime.cache.fingerprint.RunningHash`, or one that is simulated."""

    @property
    def tokens(self) -> int:
        """Its S-tokens."""

    def digests(self, count: int) -> tuple[bytes, bytes]:
        """Hashes the first `count` tokens, and all of them."""


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """What a slot holds.

    Attributes:
        slot: Its number.
        tokens: S-tokens since the start of the history.
        events: Running hash of those tokens.
        context: Hash of the profile and context of the last request.
        stored: When it was computed, on the cache's clock, seconds.
        crossings: Anchors that the state was carried across without a prefill; 0 where it is exact.
    """

    slot: int
    tokens: int
    events: bytes
    context: bytes
    stored: float = 0.0
    crossings: int = 0


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a bundle and its user allow.

    Attributes:
        pyramid: The bundle's windows.
        can_append: Whether the bundle has an append graph; an intent-ordered merge never has one.
        reuse: `exact`, or `stale` to carry a state across anchors.
        stale_crossings: Anchors that a state is carried across before it is prefilled again.
    """

    pyramid: Pyramid
    can_append: bool
    reuse: Reuse = "exact"
    stale_crossings: int = STALE_CROSSINGS


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """What the cache has for a request.

    Attributes:
        kind: The result.
        entry: The state found; None for a prefill.
        fresh: Events that the state lacks.
        recompute: Whether anything is to be computed before decode: new events, or another profile or context.
        dropped: Per layer, tokens that leave the left end of the window; all 0 unless stale.
        crossings: Anchors that the state will have been carried across after the request.
        events: Running hash of the request's whole history.
        tokens: S-tokens of that history.
        offloaded: Whether the state must be read from the offload file first.
    """

    kind: Kind
    entry: CacheEntry | None
    fresh: int
    recompute: bool
    dropped: tuple[int, ...]
    crossings: int
    events: bytes
    tokens: int
    offloaded: bool = False


def look_up(policy: Policy, entry: CacheEntry | None, history: HistoryHash, context: bytes) -> Lookup:
    """Decides what a request does with the state that its user has.

    The state serves if the tokens that it was computed from are the first ones of the request's history, decided by
    their hash. It is exact as long as no layer's keys start elsewhere (`onetrans.features.windows`). Another profile or
    context leaves the windows valid: what depends on it is made anew by an append of no events.
    """
    pyramid = policy.pyramid
    prefix, whole = history.digests(min(entry.tokens, history.tokens) if entry else 0)
    prefill = Lookup(
        kind="prefill",
        entry=None,
        fresh=history.tokens,
        recompute=True,
        dropped=(0,) * pyramid.layers,
        crossings=0,
        events=whole,
        tokens=history.tokens,
    )
    if entry is None or entry.tokens > history.tokens or entry.events != prefix:
        return prefill
    fresh = history.tokens - entry.tokens
    recompute = fresh > 0 or entry.context != context
    if recompute and not (policy.can_append and entry.tokens):
        return prefill
    exact = fresh == 0 or pyramid.can_append(entry.tokens, history.tokens)
    crossed = 0 if exact else history.tokens // pyramid.chunk - entry.tokens // pyramid.chunk
    crossings = entry.crossings + crossed
    if crossings and (policy.reuse != "stale" or crossings > policy.stale_crossings):
        return prefill
    before, after = (pyramid.key_starts(n) for n in (entry.tokens, history.tokens))
    if crossed and any(start >= entry.tokens for start in after):  # a layer would keep nothing
        return prefill
    return Lookup(
        kind="stale" if crossings else "append" if fresh else "reuse",
        entry=entry,
        fresh=fresh,
        recompute=recompute,
        dropped=tuple(b - a for a, b in zip(before, after, strict=True)),
        crossings=crossings,
        events=whole,
        tokens=history.tokens,
    )
