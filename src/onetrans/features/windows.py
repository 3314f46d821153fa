"""The pyramid's anchored windows: which S-tokens a layer still sees.

With L events so far, chunk c, anchor A = L - L mod c and keep_0 the maximum history,

    s_l(L) = max(0, A - keep_l),  l = 0 ... n

tokens with index >= s_{l-1} enter layer l and are its keys, those >= s_l query in it and go on. The starts stand still
until L crosses a multiple of c, and until then appending to a cached state is exact. c = 1 is the sliding tail of
arXiv 2510.26104, section 3.4. Indices count from the start of the history.
"""

from __future__ import annotations

from dataclasses import dataclass

from onetrans.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Pyramid:
    """The windows of every layer.

    Attributes:
        max_history: Most S-tokens that a fresh window holds at an anchor: keep_0.
        keep: S-tokens that each layer queries, counted from the anchor: keep_1 … keep_n; never growing.
        chunk: Events between anchors: c.
    """

    max_history: int
    keep: tuple[int, ...]
    chunk: int

    def __post_init__(self) -> None:
        sizes = (self.max_history, *self.keep, self.chunk)
        if not self.keep or not all(type(size) is int and size > 0 for size in sizes):
            raise ConfigError(
                f"pyramid: max_history {self.max_history!r}, keep {self.keep!r} and chunk {self.chunk!r} must be whole"
                " numbers from 1, with a keep for each layer"
            )
        if any(below > above for above, below in zip(sizes, self.keep, strict=False)):
            raise ConfigError(
                f"pyramid: keep {self.keep} must not grow from layer to layer, from {self.max_history} on"
            )

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return len(self.keep)

    def starts(self, tokens: int) -> tuple[int, ...]:
        """First token s_0 … s_n of each window in a history of so many tokens, one more than there are layers."""
        anchor = tokens - tokens % self.chunk
        return tuple(max(0, anchor - keep) for keep in (self.max_history, *self.keep))

    def key_starts(self, tokens: int) -> tuple[int, ...]:
        """First key of each layer [layers]: `starts` without what leaves the last layer, which nothing reads."""
        return self.starts(tokens)[:-1]

    @property
    def capacities(self) -> tuple[int, ...]:
        """Most tokens that each of `starts` can leave, one more than there are layers: entry l is layer l's window."""
        bounds: list[int] = []
        for keep in (self.max_history, *self.keep):
            most = keep + self.chunk - 1
            bounds.append(min(bounds[-1], most) if bounds else most)
        return tuple(bounds)

    def can_append(self, old: int, new: int) -> bool:
        """Whether a state of `old` tokens can grow to `new` tokens exactly: no layer's keys start elsewhere."""
        return 0 < old <= new and self.key_starts(old) == self.key_starts(new)
