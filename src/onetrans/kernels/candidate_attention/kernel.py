"""candidate_attention in Triton: a tile holds whole candidates of one user, and reads the user's keys once for all.

The keys of all segments form one sequence, cut into splits of fixed length. Each split, and then the candidates' own
blocks, is summed from scratch and folded in order, whether one program does all of it or a program each: which of the
two happens depends on how full the device is, and the result does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from onetrans.kernels.candidate_attention.configs import default, padded
from onetrans.kernels.candidate_attention.parts import ends, factors, over_keys, over_own, place
from onetrans.kernels.jit import capacity, head_parts, interpreted, launcher, name_of, narrow, token_stride
from onetrans.kernels.launch import LaunchConfig, choose
from onetrans.kernels.launch.device import device_of, multiprocessors
from onetrans.kernels.launch.table import problem

SEGMENTS = 3
MOST_POSITIONS = 128  # a tile holds at least one candidate
INTEGERS = ("C", "rows", "capacity0", "capacity1", "capacity2")
FOLD_INTEGERS = (*INTEGERS, "splits")
LENGTHS = ("length0", "length1", "length2", "slots", "starts")  # rows of wider tensors: aligned or not, one variant


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=LENGTHS)
def candidate_attention_kernel(
    q, k, v, key0, key1, key2, value0, value1, value2, length0, length1, length2, slots, starts,
    C, rows, capacity0, capacity1, capacity2, out, part, part_m, part_total,
    H: tl.constexpr, P: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, ROW: tl.constexpr, TOKEN: tl.constexpr,
    SEGMENTS: tl.constexpr, HAS_SLOTS: tl.constexpr, RAGGED: tl.constexpr, APART: tl.constexpr, GROUP: tl.constexpr,
    PAD: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program per tile of GROUP candidates, head and user; where APART, per split too.

    q, k and v are [P, rows, …] with ROW elements between rows; keyN and valueN are slabs [slots, capacityN, H, E] with
    TOKEN elements between tokens, of which lengthN[u] are valid. `slots` says which slot of the last segment, the
    history, holds a user. The candidates of user u are rows starts[u] … starts[u + 1] - 1, or where not RAGGED C each.
    """
    E: tl.constexpr = E0 + E1
    tile = tl.program_id(0)
    head = tl.program_id(1)
    user = tl.program_id(2)
    splits = 1
    split = 0
    if APART:
        splits = tl.num_programs(1) // H
        split = head // H
        head = head % H
    first, here, row_candidate, row_position = place(tile, user, starts if RAGGED else None, C, P, GROUP, BLOCK_M)
    if here <= 0:
        return
    real = row_candidate < here
    position_stride = tl.cast(rows, tl.int64) * ROW
    offset = head * E
    q_rows = row_position * position_stride + (first + row_candidate).to(tl.int64) * ROW + offset
    e0 = tl.arange(0, E0)
    q0 = tl.load((q + q_rows)[:, None] + e0[None, :], mask=real[:, None], other=0.0)
    q1 = q0
    if E1 > 0:
        e1 = E0 + tl.arange(0, E1)
        q1 = tl.load((q + q_rows)[:, None] + e1[None, :], mask=real[:, None], other=0.0)
    same = user.to(tl.int64)
    slot = same
    if HAS_SLOTS:
        slot = tl.load(slots + user).to(tl.int64)
    end0, end1, count = ends(user, length0, length1, length2, capacity0, capacity1, capacity2, SEGMENTS)
    at0 = (slot if SEGMENTS == 1 else same) * capacity0 * TOKEN + offset
    at1 = (slot if SEGMENTS == 2 else same) * capacity1 * TOKEN + offset
    at2 = slot * capacity2 * TOKEN + offset
    k0, k1, k2 = key0 + at0, key1 + at1, key2 + at2
    v0, v1, v2 = value0 + at0, value1 + at1, value2 + at2
    if APART:
        is_own = split == splits - 1
        if (split * SPLIT >= count) & (is_own == 0):
            return
        if is_own == 0:
            m, total, acc0, acc1 = over_keys(
                split * SPLIT, tl.minimum(split * SPLIT + SPLIT, count), q0, q1, k0, k1, k2, v0, v1, v2, end0, end1,
                E0, E1, TOKEN, SEGMENTS, BLOCK_M, BLOCK_N, WIDE,
            )  # fmt: skip
        else:
            m, total, acc0, acc1 = over_own(
                q0, q1, k, v, row_candidate, row_position, first, here, position_stride, offset,
                P, ROW, E0, E1, GROUP, PAD, BLOCK_M, BLOCK_N, WIDE,
            )  # fmt: skip
        which = ((same * tl.num_programs(0) + tile) * H + head) * splits + split
        row = tl.arange(0, BLOCK_M)
        tl.store(part_m + which * BLOCK_M + row, m)
        tl.store(part_total + which * BLOCK_M + row, total)
        part_rows = part + (which * BLOCK_M + row) * E
        tl.store(part_rows[:, None] + e0[None, :], acc0)
        if E1 > 0:
            tl.store(part_rows[:, None] + e1[None, :], acc1)
    else:
        m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc0 = tl.zeros((BLOCK_M, E0), tl.float32)
        acc1 = acc0
        if E1 > 0:
            acc1 = tl.zeros((BLOCK_M, E1), tl.float32)
        for begin in range(0, count, SPLIT):
            m_next, total_next, next0, next1 = over_keys(
                begin, tl.minimum(begin + SPLIT, count), q0, q1, k0, k1, k2, v0, v1, v2, end0, end1,
                E0, E1, TOKEN, SEGMENTS, BLOCK_M, BLOCK_N, WIDE,
            )  # fmt: skip
            m, before, after = factors(m, m_next)
            total = tl.fma(total, before, total_next * after)
            acc0 = tl.fma(acc0, before[:, None], next0 * after[:, None])
            if E1 > 0:
                acc1 = tl.fma(acc1, before[:, None], next1 * after[:, None])
        m_next, total_next, next0, next1 = over_own(
            q0, q1, k, v, row_candidate, row_position, first, here, position_stride, offset,
            P, ROW, E0, E1, GROUP, PAD, BLOCK_M, BLOCK_N, WIDE,
        )  # fmt: skip
        m, before, after = factors(m, m_next)
        total = tl.fma(total, before, total_next * after)
        acc0 = tl.fma(acc0, before[:, None], next0 * after[:, None])
        if E1 > 0:
            acc1 = tl.fma(acc1, before[:, None], next1 * after[:, None])
        total = tl.where(real, total, 1.0)
        out_rows = (row_position * tl.cast(rows, tl.int64) + first + row_candidate) * (H * E) + offset
        inside = real[:, None]
        tl.store(
            (out + out_rows)[:, None] + e0[None, :],
            narrow(acc0 / total[:, None], out.dtype.element_ty, WIDE),
            mask=inside,
        )
        if E1 > 0:
            tl.store(
                (out + out_rows)[:, None] + e1[None, :],
                narrow(acc1 / total[:, None], out.dtype.element_ty, WIDE),
                mask=inside,
            )


@triton.jit(do_not_specialize=FOLD_INTEGERS, do_not_specialize_on_alignment=LENGTHS)
def candidate_fold_kernel(
    part, part_m, part_total, length0, length1, length2, starts,
    C, rows, capacity0, capacity1, capacity2, splits, out,
    H: tl.constexpr, P: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, SEGMENTS: tl.constexpr, RAGGED: tl.constexpr,
    GROUP: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Folds what programs of their own summed for each split, in the order in which one program would have."""
    E: tl.constexpr = E0 + E1
    tile = tl.program_id(0)
    head = tl.program_id(1)
    user = tl.program_id(2)
    first, here, row_candidate, row_position = place(tile, user, starts if RAGGED else None, C, P, GROUP, BLOCK_M)
    if here <= 0:
        return
    _, _, count = ends(user, length0, length1, length2, capacity0, capacity1, capacity2, SEGMENTS)
    row = tl.arange(0, BLOCK_M)
    real = row_candidate < here
    e0 = tl.arange(0, E0)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc0 = tl.zeros((BLOCK_M, E0), tl.float32)
    acc1 = acc0
    if E1 > 0:
        acc1 = tl.zeros((BLOCK_M, E1), tl.float32)
        e1 = E0 + tl.arange(0, E1)
    which = ((user.to(tl.int64) * tl.num_programs(0) + tile) * H + head) * splits
    of_user = (count + SPLIT - 1) // SPLIT
    for index in range(of_user + 1):
        split = which + tl.where(index < of_user, index, splits - 1)  # the own blocks come last
        m_next = tl.load(part_m + split * BLOCK_M + row)
        total_next = tl.load(part_total + split * BLOCK_M + row)
        part_rows = part + (split * BLOCK_M + row) * E
        next0 = tl.load(part_rows[:, None] + e0[None, :])
        m, before, after = factors(m, m_next)
        total = tl.fma(total, before, total_next * after)
        acc0 = tl.fma(acc0, before[:, None], next0 * after[:, None])
        if E1 > 0:
            next1 = tl.load(part_rows[:, None] + e1[None, :])
            acc1 = tl.fma(acc1, before[:, None], next1 * after[:, None])
    total = tl.where(real, total, 1.0)
    out_rows = (row_position * tl.cast(rows, tl.int64) + first + row_candidate) * (H * E) + head * E
    inside = real[:, None]
    tl.store(
        (out + out_rows)[:, None] + e0[None, :], narrow(acc0 / total[:, None], out.dtype.element_ty, WIDE), mask=inside
    )
    if E1 > 0:
        tl.store(
            (out + out_rows)[:, None] + e1[None, :],
            narrow(acc1 / total[:, None], out.dtype.element_ty, WIDE),
            mask=inside,
        )


def signature(dtype: str) -> dict[str, str]:
    """Types of the run-time arguments of `candidate_attention_kernel`, in order."""
    values = (f"{kind}{i}" for kind in ("key", "value") for i in range(SEGMENTS))
    lengths = (*(f"length{i}" for i in range(SEGMENTS)), "slots", "starts")
    return {
        **dict.fromkeys(("q", "k", "v", *values), f"*{dtype}"),
        **dict.fromkeys(lengths, "*i64"),
        **dict.fromkeys(INTEGERS, "i32"),
        "out": f"*{dtype}",
        **dict.fromkeys(("part", "part_m", "part_total"), "*fp32"),
    }


def constants(
    config: LaunchConfig,
    *,
    H: int,
    P: int,
    E: int,
    row: int,
    token: int,
    segments: int,
    slots: bool,
    ragged: bool,
    apart: bool,
) -> dict[str, Any]:
    """Values of `candidate_attention_kernel`'s compile-time arguments; `row` and `token` are strides in elements."""
    main, rest = head_parts(E)
    return {
        "H": H,
        "P": P,
        "E0": main,
        "E1": rest,
        "ROW": row,
        "TOKEN": token,
        "SEGMENTS": segments,
        "HAS_SLOTS": slots,
        "RAGGED": ragged,
        "APART": apart,
        "GROUP": config.block_m // P,
        "PAD": padded(P),
        "SPLIT": config.split,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "WIDE": interpreted(),
    }


def _row_stride(x: torch.Tensor) -> int:
    """Elements between rows of x [P, B, D], whose positions are B rows apart.

    Raises:
        ValueError: It does not lie so.
    """
    P, B, D = x.shape
    row = x.stride(1) if B > 1 else x.stride(0) if P > 1 else D
    if x.stride(2) != 1 or (P > 1 and x.stride(0) != B * row):
        raise ValueError(f"rows {tuple(x.shape)} have strides {x.stride()}; positions must be B rows apart")
    return row


def _strides(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
) -> tuple[int, int]:
    """Elements between rows of q, k and v, and between tokens of the segments.

    Raises:
        ValueError: Sizes or strides that the kernel cannot take.
    """
    if not 1 <= len(keys) <= SEGMENTS:
        raise ValueError(f"{len(keys)} segments were given; the kernel takes 1 to {SEGMENTS}")
    if q.shape[0] > MOST_POSITIONS:
        raise ValueError(f"{q.shape[0]} positions were given; the kernel takes at most {MOST_POSITIONS}")
    row = _row_stride(q)
    for name, rows in (("k", k), ("v", v)):
        if rows.shape != q.shape or _row_stride(rows) != row:
            raise ValueError(f"{name} {tuple(rows.shape)} with strides {rows.stride()} must lie as q does")
    E = keys[0].shape[3]
    token = token_stride("segment 0", keys[0], E)
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        if key.stride() != value.stride() or token_stride(f"segment {i}", key, E) != token:
            raise ValueError(f"the keys and values of segment {i} must lie alike, with the tokens' stride of segment 0")
    return row, token


FOLD_CONSTANTS = ("H", "P", "E0", "E1", "SEGMENTS", "RAGGED", "GROUP", "SPLIT", "BLOCK_M", "WIDE")


def launch(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    lengths: Sequence[torch.Tensor],
    slots: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    candidates: int | None = None,
    apart: bool | None = None,
) -> None:
    """Fills `out` [P, B, H·E]; arguments as of `candidate_attention_reference`, read in place by their strides.

    Args:
        out: Where the result goes, contiguous.
        q: Queries [P, B, H·E]; rows may be parts of wider ones.
        k: Own keys, of the same strides.
        v: Own values, of the same strides.
        keys: One to three segments [U, W, H, E] that lie alike token by token.
        values: Likewise.
        lengths: Valid tokens [U] of each segment, int64.
        slots: Slot of the last segment that holds each user [U], int64; None where slot and user are the same.
        starts: First row of each user and the end of the last [U + 1], int64; None where all have B / U candidates.
        candidates: Most candidates of a user; needed with `starts`.
        apart: Whether each split gets a program of its own; None decides by how many tiles there are. Either way the
            result is the same.

    Raises:
        ValueError: Sizes or strides that the kernel cannot take.
    """
    if starts is not None and candidates is None:
        raise ValueError("starts was given without candidates, the most that one user has")
    row, token = _strides(q, k, v, keys, values)
    P, B, _ = q.shape
    H, E = keys[0].shape[2:]
    U = lengths[0].shape[0]
    segments = len(keys)
    if B == 0:
        return
    C = B // U if candidates is None else candidates
    what = problem("candidate_attention", name_of(q.dtype), B * P, E=E, H=H, P=P)
    config = choose(what, device_of(q.device), default)
    tiles = triton.cdiv(C, config.block_m // P)
    capacities = [capacity(key, token) for key in keys]
    splits = triton.cdiv(sum(capacities), config.split) + 1
    if apart is None:
        apart = type(tiles) is int and splits > 2 and 4 * tiles * H * U <= multiprocessors(q.device)
    arguments = constants(
        config,
        H=H,
        P=P,
        E=E,
        row=row,
        token=token,
        segments=segments,
        slots=slots is not None,
        ragged=starts is not None,
        apart=apart,
    )
    parts = (U, tiles, H, splits, config.block_m) if apart else (1,)
    part, part_m, part_total = (
        torch.empty((*parts, width), dtype=torch.float32, device=q.device)
        for width in ((E, 1, 1) if apart else (1, 1, 1))
    )
    fill = SEGMENTS - segments
    capacities += [0] * fill
    lengths = [length.contiguous() for length in lengths]
    at = [*lengths, *[lengths[0]] * fill]
    bounds = lengths[0] if starts is None else starts.contiguous()
    launcher(candidate_attention_kernel)[(tiles, H * splits if apart else H, U)](
        q,
        k,
        v,
        *keys,
        *[k] * fill,
        *values,
        *[v] * fill,
        *at,
        lengths[0] if slots is None else slots.contiguous(),
        bounds,
        C,
        B,
        *capacities,
        out,
        part,
        part_m,
        part_total,
        **arguments,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if apart:
        launcher(candidate_fold_kernel)[(tiles, H, U)](
            part,
            part_m,
            part_total,
            *at,
            bounds,
            C,
            B,
            *capacities,
            splits,
            out,
            **{name: arguments[name] for name in FOLD_CONSTANTS},
            num_warps=config.warps,
        )


@torch.library.triton_op("onetrans_triton::candidate_attention", mutates_args=())
def candidate_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    lengths: Sequence[torch.Tensor],
    slots: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    candidates: int | None = None,
) -> torch.Tensor:
    """The kernel as an op that captures see into; see `launch`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch(out, q, k, v, keys, values, lengths, slots, starts, candidates)
    return out
