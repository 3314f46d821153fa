"""Parts of the candidate_attention kernels: sums over keys and over own blocks, and how they are folded."""

from __future__ import annotations

import triton
import triton.language as tl

from onetrans.kernels.jit import LOG2E, dot, narrow, softmax_step


@triton.jit
def ends(user, length0, length1, length2, capacity0, capacity1, capacity2, SEGMENTS: tl.constexpr):
    """Where the first two segments end in the sequence of all, and how long that is; never beyond a segment's slab."""
    # A length beyond its slab must never read the state of another user, whatever the caller passed.
    end0 = tl.minimum(tl.load(length0 + user).to(tl.int32), capacity0)
    end1 = end0
    if SEGMENTS > 1:
        end1 = end0 + tl.minimum(tl.load(length1 + user).to(tl.int32), capacity1)
    count = end1
    if SEGMENTS > 2:
        count = end1 + tl.minimum(tl.load(length2 + user).to(tl.int32), capacity2)
    return end0, end1, count


@triton.jit
def sequence(at, base0, base1, base2, end0, end1, TOKEN: tl.constexpr, SEGMENTS: tl.constexpr):
    """Addresses of tokens `at` of the segments' sequence."""
    # As in history_attention: a tile may hold tokens of several segments, so that tiles stand at fixed places.
    address = base0 + at * TOKEN
    if SEGMENTS > 1:
        address = tl.where(at < end0, address, base1 + (at - end0) * TOKEN)
    if SEGMENTS > 2:
        address = tl.where(at < end1, address, base2 + (at - end1) * TOKEN)
    return address


@triton.jit
def over_keys(
    begin, end, q0, q1, k0, k1, k2, v0, v1, v2, end0, end1,
    E0: tl.constexpr, E1: tl.constexpr, TOKEN: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile's maximum, total and weighted values over keys begin … end - 1."""
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    e0 = tl.arange(0, E0)
    acc0 = tl.zeros((BLOCK_M, E0), tl.float32)
    acc1 = acc0
    if E1 > 0:
        acc1 = tl.zeros((BLOCK_M, E1), tl.float32)
        e1 = E0 + tl.arange(0, E1)
    for start in range(begin, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        exists = (at < end)[:, None]
        key_rows = sequence(at, k0, k1, k2, end0, end1, TOKEN, SEGMENTS)
        value_rows = sequence(at, v0, v1, v2, end0, end1, TOKEN, SEGMENTS)
        key = tl.load(key_rows[:, None] + e0[None, :], mask=exists, other=0.0)
        value = tl.load(value_rows[:, None] + e0[None, :], mask=exists, other=0.0)
        scores = dot(q0, tl.trans(key), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), WIDE)
        if E1 > 0:
            key = tl.load(key_rows[:, None] + e1[None, :], mask=exists, other=0.0)
            scores = dot(q1, tl.trans(key), scores, WIDE)
        # Every candidate sees all of the user's valid tokens: the mask is the end of the keys, alike for all rows.
        scores = tl.where((at < end)[None, :], scores, float("-inf"))
        weights, m, total, factor = softmax_step(scores, m, total)
        weights = narrow(weights, value.dtype, WIDE)
        acc0 = dot(weights, value, acc0 * factor[:, None], WIDE)
        if E1 > 0:
            value = tl.load(value_rows[:, None] + e1[None, :], mask=exists, other=0.0)
            acc1 = dot(weights, value, acc1 * factor[:, None], WIDE)
    return m, total, acc0, acc1


@triton.jit
def over_own(
    q0, q1, k, v, row_candidate, row_position, first, here, position_stride, offset,
    P: tl.constexpr, ROW: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, GROUP: tl.constexpr, PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The same over the candidates' own causal blocks; candidate c of the tile has columns c·PAD … c·PAD + P - 1."""
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    e0 = tl.arange(0, E0)
    acc0 = tl.zeros((BLOCK_M, E0), tl.float32)
    acc1 = acc0
    if E1 > 0:
        acc1 = tl.zeros((BLOCK_M, E1), tl.float32)
        e1 = E0 + tl.arange(0, E1)
    # Candidates' blocks lie PAD columns apart (`configs.padded`), so that a tile of BLOCK_N columns holds whole blocks
    # or whole parts of one. Rows meet other candidates' columns too, and mask them: that fills the matrix unit, which
    # takes no fewer than 64 rows on Hopper, with one product where a product per candidate would have P rows each.
    for start in range(0, GROUP * PAD, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        candidate = column // PAD
        position = column % PAD
        exists = ((candidate < here) & (position < P))[:, None]
        rows = position * position_stride + (first + candidate).to(tl.int64) * ROW + offset
        key = tl.load((k + rows)[:, None] + e0[None, :], mask=exists, other=0.0)
        value = tl.load((v + rows)[:, None] + e0[None, :], mask=exists, other=0.0)
        scores = dot(q0, tl.trans(key), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), WIDE)
        if E1 > 0:
            key = tl.load((k + rows)[:, None] + e1[None, :], mask=exists, other=0.0)
            scores = dot(q1, tl.trans(key), scores, WIDE)
        visible = (candidate[None, :] == row_candidate[:, None]) & (position[None, :] <= row_position[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        weights, m, total, factor = softmax_step(scores, m, total)
        weights = narrow(weights, value.dtype, WIDE)
        acc0 = dot(weights, value, acc0 * factor[:, None], WIDE)
        if E1 > 0:
            value = tl.load((v + rows)[:, None] + e1[None, :], mask=exists, other=0.0)
            acc1 = dot(weights, value, acc1 * factor[:, None], WIDE)
    return m, total, acc0, acc1


@triton.jit
def factors(m, m_next):
    """The new maximum of a fold, and what each side is multiplied by."""
    top = tl.maximum(m, m_next)
    # Both sides may have seen nothing: their factors are then exp2(-inf) = 0, not the NaN of -inf - -inf. A side that
    # is empty alone has factor 0, and the other one exactly 1, so folding an empty split changes no bit.
    safe = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.exp2((m - safe) * LOG2E), tl.exp2((m_next - safe) * LOG2E)


@triton.jit
def place(tile, user, starts, C, P: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tile's first candidate row, its number of candidates, and each row's candidate and position.

    `starts` is None where users bring C candidates each: torch's analysis of what a kernel writes takes every tensor of
    a call that leads to a store's address for written.
    """
    first = user * C
    count = C
    if starts is not None:
        first = tl.load(starts + user).to(tl.int32)
        count = tl.load(starts + user + 1).to(tl.int32) - first
    here = tl.minimum(count - tile * GROUP, GROUP)
    row = tl.arange(0, BLOCK_M)
    return first + tile * GROUP, here, row // P, row % P
