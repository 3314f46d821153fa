"""Anchored windows: which S-tokens a layer of the pyramid still sees.

With L events so far, chunk c, anchor A = L - L mod c and keep_0 the maximum history,

    s_l(L) = max(0, A - keep_l),  l = 0 ... n

tokens with index >= s_{l-1} enter layer l and are its keys, those >= s_l query in it and go on. The starts stand still
until L crosses a multiple of c, and until then appending to a cached state is exact. c = 1 is the sliding tail of
arXiv 2510.26104, section 3.4. Indices count from the start of the history.
"""

from __future__ import annotations

from collections.abc import Sequence


def window_starts(length: int, *, max_history: int, keep: Sequence[int], chunk: int) -> tuple[int, ...]:
    """Starts s_0 ... s_n of a history of `length` tokens, one more than there are layers."""
    anchor = length - length % chunk
    return tuple(max(0, anchor - k) for k in (max_history, *keep))


def window_bounds(*, max_history: int, keep: Sequence[int], chunk: int) -> tuple[int, ...]:
    """Most tokens that each start can leave: the window's capacity in entry l of `window_starts`."""
    bounds: list[int] = []
    for k in (max_history, *keep):
        most = k + chunk - 1
        bounds.append(min(bounds[-1], most) if bounds else most)
    return tuple(bounds)


def can_append(old: int, new: int, *, max_history: int, keep: Sequence[int], chunk: int) -> bool:
    """Whether a state of `old` tokens can grow to `new` tokens exactly: no layer's keys start elsewhere.

    The last layer's own start is left out, since its S-queries feed nothing.
    """
    if not 0 < old <= new:
        return False
    before = window_starts(old, max_history=max_history, keep=keep, chunk=chunk)
    after = window_starts(new, max_history=max_history, keep=keep, chunk=chunk)
    return before[:-1] == after[:-1]
