"""history_attention in Triton: one program per tile of queries, head and user; keys and values are read in place."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from onetrans.kernels.history_attention.configs import default
from onetrans.kernels.jit import (
    capacity,
    dot,
    head_parts,
    interpreted,
    launcher,
    name_of,
    narrow,
    softmax_step,
    token_stride,
)
from onetrans.kernels.launch import LaunchConfig, choose, table
from onetrans.kernels.launch.device import device_of

INTEGERS = ("Nq", "new_capacity", "past_capacity")
# A layer's lengths are a row of a wider tensor, whose address is a multiple of 16 bytes for some layers and numbers of
# users only. Single loads gain nothing by alignment, and a variant by it would be compiled while serving.
LENGTHS = ("q_start", "length", "past_length", "slots")


@triton.jit
def _rows(keys, new_base, past_base, past, TOKEN: tl.constexpr, PAST_TOKEN: tl.constexpr, HAS_PAST: tl.constexpr):
    """Addresses of a tile's keys or values: tokens of the past, then the new ones, as one sequence."""
    if HAS_PAST:
        return tl.where(keys < past, past_base + keys * PAST_TOKEN, new_base + (keys - past) * TOKEN)
    return new_base + keys * TOKEN


@triton.jit
def _tile(
    begin, q0, q1, k_new, k_past, v_new, v_past, past, count, last, m, total, acc0, acc1,
    E0: tl.constexpr, E1: tl.constexpr, TOKEN: tl.constexpr, PAST_TOKEN: tl.constexpr, HAS_PAST: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Takes keys begin … begin + BLOCK_N - 1 into a tile's online softmax; all are visible unless MASKED."""
    keys = begin + tl.arange(0, BLOCK_N)
    # Tile shapes are powers of two; a head dimension is E0 + E1 of them, each in a product of its own (see head_parts).
    e0 = tl.arange(0, E0)
    key_rows = _rows(keys, k_new, k_past, past, TOKEN, PAST_TOKEN, HAS_PAST)
    value_rows = _rows(keys, v_new, v_past, past, TOKEN, PAST_TOKEN, HAS_PAST)
    if MASKED:
        exists = (keys < count)[:, None]  # values too: what padding holds times a weight of 0 may be NaN
        k0 = tl.load(key_rows[:, None] + e0[None, :], mask=exists, other=0.0)
        v0 = tl.load(value_rows[:, None] + e0[None, :], mask=exists, other=0.0)
    else:
        k0 = tl.load(key_rows[:, None] + e0[None, :])
        v0 = tl.load(value_rows[:, None] + e0[None, :])
    scores = dot(q0, tl.trans(k0), tl.zeros((q0.shape[0], BLOCK_N), tl.float32), WIDE)
    if E1 > 0:
        e1 = E0 + tl.arange(0, E1)
        if MASKED:
            k1 = tl.load(key_rows[:, None] + e1[None, :], mask=exists, other=0.0)
            v1 = tl.load(value_rows[:, None] + e1[None, :], mask=exists, other=0.0)
        else:
            k1 = tl.load(key_rows[:, None] + e1[None, :])
            v1 = tl.load(value_rows[:, None] + e1[None, :])
        scores = dot(q1, tl.trans(k1), scores, WIDE)
    if MASKED:
        scores = tl.where((keys[None, :] <= last[:, None]) & (keys < count)[None, :], scores, float("-inf"))
    weights, m, total, factor = softmax_step(scores, m, total)
    weights = narrow(weights, v0.dtype, WIDE)  # the matrix unit takes one dtype; `total` has summed them in float32
    acc0 = dot(weights, v0, acc0 * factor[:, None], WIDE)
    if E1 > 0:
        acc1 = dot(weights, v1, acc1 * factor[:, None], WIDE)
    return m, total, acc0, acc1


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=LENGTHS)
def history_attention_kernel(
    q, k, v, past_k, past_v, q_start, length, past_length, slots, Nq, new_capacity, past_capacity, out,
    H: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, Q_TOKEN: tl.constexpr, TOKEN: tl.constexpr,
    PAST_TOKEN: tl.constexpr, HAS_PAST: tl.constexpr, HAS_SLOTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Query i of user u sees keys 0 … past_length[u] + q_start[u] + i of its past and new tokens, as one sequence.

    Strides between tokens are compile-time constants; *_capacity counts the tokens between two users or slots. `slots`
    says which slot of the past holds a user or, without a past, which slot of k and v.
    """
    E: tl.constexpr = E0 + E1
    # Programs start in the order of their numbers and later queries see more keys: the longest start first, so that the
    # short ones fill the device's end. Tiles of one head are neighbours and share its keys in L2.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    user = tl.program_id(2)
    slot = user.to(tl.int64)
    if HAS_SLOTS:
        slot = tl.load(slots + user).to(tl.int64)
    past = 0
    k_past = past_k
    v_past = past_v
    new = slot
    if HAS_PAST:
        past = tl.load(past_length + user).to(tl.int32)
        past_offset = slot * past_capacity * PAST_TOKEN + head * E
        k_past = past_k + past_offset
        v_past = past_v + past_offset
        new = user.to(tl.int64)
    new_offset = new * new_capacity * TOKEN + head * E
    k_new = k + new_offset
    v_new = v + new_offset
    first = past + tl.load(q_start + user).to(tl.int32)
    count = past + tl.load(length + user).to(tl.int32)
    if not HAS_PAST:
        count = tl.minimum(count, new_capacity)  # never another user's state
    begin = tile * BLOCK_M
    rows = begin + tl.arange(0, BLOCK_M)
    real = rows < tl.minimum(count - first, Nq)
    last = first + rows
    q_rows = q + (user.to(tl.int64) * Nq + rows) * Q_TOKEN + head * E
    e0 = tl.arange(0, E0)
    q0 = tl.load(q_rows[:, None] + e0[None, :], mask=real[:, None], other=0.0)
    acc0 = tl.zeros((BLOCK_M, E0), tl.float32)
    q1 = q0
    acc1 = acc0
    if E1 > 0:
        e1 = E0 + tl.arange(0, E1)
        q1 = tl.load(q_rows[:, None] + e1[None, :], mask=real[:, None], other=0.0)
        acc1 = tl.zeros((BLOCK_M, E1), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    end = tl.where(begin < count - first, tl.minimum(first + begin + BLOCK_M, count), 0)
    # Up to `whole` every row sees every key: no masks. Both loops step from key 0 in BLOCK_N: a key's
    # tile depends on its index in the window alone, which keeps a row's bits the same in prefill and append.
    whole = tl.minimum(end, first + begin + 1) // BLOCK_N * BLOCK_N
    for at in range(0, whole, BLOCK_N):
        m, total, acc0, acc1 = _tile(
            at, q0, q1, k_new, k_past, v_new, v_past, past, count, last, m, total, acc0, acc1,
            E0, E1, TOKEN, PAST_TOKEN, HAS_PAST, BLOCK_N, False, WIDE,
        )  # fmt: skip
    for at in range(whole, end, BLOCK_N):
        m, total, acc0, acc1 = _tile(
            at, q0, q1, k_new, k_past, v_new, v_past, past, count, last, m, total, acc0, acc1,
            E0, E1, TOKEN, PAST_TOKEN, HAS_PAST, BLOCK_N, True, WIDE,
        )  # fmt: skip
    scale = tl.where(real, 1.0, 0.0) / tl.where(total > 0, total, 1.0)  # padding rows become zeros
    out_rows = out + (user.to(tl.int64) * Nq + rows) * (H * E) + head * E
    inside = (rows < Nq)[:, None]
    tl.store(out_rows[:, None] + e0[None, :], narrow(acc0 * scale[:, None], out.dtype.element_ty, WIDE), mask=inside)
    if E1 > 0:
        tl.store(
            out_rows[:, None] + e1[None, :], narrow(acc1 * scale[:, None], out.dtype.element_ty, WIDE), mask=inside
        )


def signature(dtype: str) -> dict[str, str]:
    """Types of the run-time arguments, in order."""
    pointers = dict.fromkeys(("q", "k", "v", "past_k", "past_v"), f"*{dtype}")
    lengths = dict.fromkeys(LENGTHS, "*i64")
    return {**pointers, **lengths, **dict.fromkeys(INTEGERS, "i32"), "out": f"*{dtype}"}


def constants(
    config: LaunchConfig, *, H: int, E: int, q_token: int, token: int, past_token: int, past: bool, slots: bool
) -> dict[str, Any]:
    """Values of the compile-time arguments; strides between tokens are in elements, past_token 0 without a past."""
    main, rest = head_parts(E)
    return {
        "H": H,
        "E0": main,
        "E1": rest,
        "Q_TOKEN": q_token,
        "TOKEN": token,
        "PAST_TOKEN": past_token,
        "HAS_PAST": past,
        "HAS_SLOTS": slots,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "WIDE": interpreted(),
    }


def launch(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_start: torch.Tensor,
    length: torch.Tensor,
    past_k: torch.Tensor | None = None,
    past_v: torch.Tensor | None = None,
    past_length: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> None:
    """Fills `out` [U, Nq, H, E]; arguments as of `history_attention_reference`, read in place by their strides.

    With `slots` [U] int64, user u's past (without a past, its k and v) is row slots[u] of a slab [slots, W, H, E].

    Raises:
        ValueError: Sizes or strides that the kernel cannot take.
    """
    U, Nq, H, E = q.shape
    strides = {"q": token_stride("q", q, E), "past_k": 0}
    for name, key, value in (("k", k, v), ("past_k", past_k, past_v)):
        if key is not None and value is not None:
            strides[name] = token_stride(name, key, E)
            if key.stride() != value.stride() or key.shape != value.shape:
                raise ValueError(f"{name} {tuple(key.shape)} and its values {tuple(value.shape)} must lie alike")
    if Nq == 0:
        return
    if U > 1 and q.stride(0) != Nq * strides["q"]:
        raise ValueError(f"q has strides {q.stride()}; its users must be {Nq} tokens apart: call .contiguous()")
    config = choose(
        table.problem("history_attention", name_of(q.dtype), U * Nq, E=E, H=H), device_of(q.device), default
    )
    arguments = constants(
        config,
        H=H,
        E=E,
        q_token=strides["q"],
        token=strides["k"],
        past_token=strides["past_k"],
        past=past_k is not None,
        slots=slots is not None,
    )
    q_start, length = q_start.contiguous(), length.contiguous()
    launcher(history_attention_kernel)[(triton.cdiv(Nq, config.block_m), H, U)](
        q,
        k,
        v,
        k if past_k is None else past_k,
        v if past_v is None else past_v,
        q_start,
        length,
        length if past_length is None else past_length.contiguous(),
        q_start if slots is None else slots.contiguous(),
        Nq,
        capacity(k, strides["k"]),
        0 if past_k is None else capacity(past_k, strides["past_k"]),
        out,
        **arguments,
        num_warps=config.warps,
        num_stages=config.stages,
    )


@torch.library.triton_op("onetrans_triton::history_attention", mutates_args=())
def history_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_start: torch.Tensor,
    length: torch.Tensor,
    past_k: torch.Tensor | None = None,
    past_v: torch.Tensor | None = None,
    past_length: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernel as an op that captures see into; see `launch`."""
    out = q.new_empty(q.shape)
    launch(out, q, k, v, q_start, length, past_k, past_v, past_length, slots)
    return out
