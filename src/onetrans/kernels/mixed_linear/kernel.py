"""mixed_linear in Triton: one program per tile of rows, tile of columns and position; x is read once.

RMSNorm needs no pass of its own: x * gain goes into the product, and since 1 / rms is one number per row it multiplies
the sums at the end; the squares are summed on the way.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from onetrans.kernels.activations import ACTIVATIONS
from onetrans.kernels.jit import activate, dot, interpreted, launcher, name_of, narrow, row_sum
from onetrans.kernels.launch import LaunchConfig, Problem, choose, table
from onetrans.kernels.launch.device import device_of
from onetrans.kernels.mixed_linear.arguments import check_dtypes, check_shape, in_place, row_stride
from onetrans.kernels.mixed_linear.configs import default

# Sizes of requests, not specialised on: Triton would make variants for 1 and for multiples of 16.
INTEGERS = ("rows", "x_position", "tokens", "window")


@triton.jit
def affine(acc, inverse, bias, inside):
    """acc * inverse + bias in float32, as one fused multiply-add; inverse and bias (its addresses) may be None."""
    start = tl.zeros((1, acc.shape[1]), tl.float32)
    if bias is not None:
        start = tl.load(bias, mask=inside, other=0.0).to(tl.float32)[None, :]
    if inverse is not None:
        return tl.fma(acc, inverse[:, None], start)
    return acc + start


@triton.jit
def load_constant(at, mask, WHOLE: tl.constexpr):
    """A tile of weights or gains, zero outside the mask; WHOLE says that nothing of it lies outside."""
    if WHOLE:
        return tl.load(at)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=("slots", "first", "length"))
def mixed_linear_kernel(
    x, w, gain, bias, residual, slots, first, length, rows, x_position, tokens, window, out, v_state,
    D: tl.constexpr, F: tl.constexpr, X_ROW: tl.constexpr, GAIN_POSITION: tl.constexpr, EPS: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEPS_K: tl.constexpr,
):  # fmt: skip
    """out [P, rows, F] = residual + act(RMSNorm(x) @ w + bias); with STATE rows of K and V go into slabs instead.

    X_ROW and x_position are the elements between x's rows and positions; all else is contiguous. With STATE, P is 1,
    row u * tokens + i is token i of user u, and its halves go to row first[u] + i < window of slab slots[u].
    """
    p = tl.program_id(2).to(tl.int64)
    row0 = tl.program_id(0) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    real = m < rows - row0
    SPAN: tl.constexpr = F // 2 if STATE else F  # no tile of columns holds parts of both K and V
    TILES: tl.constexpr = (SPAN + BLOCK_N - 1) // BLOCK_N
    half = tl.program_id(1) // TILES
    n = (tl.program_id(1) - half * TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < SPAN
    depth = D
    if STATE:
        user = row0 // tokens
        token = row0 - user * tokens
        depth = tl.where((token + BLOCK_M <= tokens) & (token >= tl.load(length + user)), 0, D)  # padding costs nothing
    position = p * x_position
    if X_ROW % 8 == 0:  # see `in_place`
        position = tl.multiple_of(position, 8)
    WIDTH: tl.constexpr = 2 * F if GATED else F
    columns = half * SPAN + n
    k = tl.arange(0, BLOCK_K)
    x_tile = x + position + row0.to(tl.int64) * X_ROW + m[:, None] * X_ROW + k[None, :]
    w_tile = w + p * (D * WIDTH) + k[:, None] * WIDTH + columns[None, :]
    WHOLE: tl.constexpr = D % BLOCK_K == 0 and SPAN % BLOCK_N == 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_value = acc
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    # x is read once: the product takes x * gain, the squares of the same tile are summed beside it, and 1 / rms, one
    # number per row, multiplies the finished sums.
    for k0 in range(0, depth, BLOCK_K):
        x_mask = real[:, None]
        w_mask = inside[None, :]
        if D % BLOCK_K != 0:  # decided when compiling: most models' widths need no mask in depth
            x_mask = x_mask & (k < D - k0)[None, :]
            w_mask = w_mask & (k < D - k0)[:, None]
        a = tl.load(x_tile + k0, mask=x_mask, other=0.0)
        if gain is not None:
            wide = a.to(tl.float32)
            squares = tl.fma(wide, wide, squares)
            scale = load_constant(gain + p * GAIN_POSITION + k0 + k, k < D - k0, D % BLOCK_K == 0)
            a = narrow(wide * scale.to(tl.float32)[None, :], a.dtype, WIDE)
        b = load_constant(w_tile + k0 * WIDTH, w_mask, WHOLE)
        acc = dot(a, b, acc, WIDE)
        if GATED:
            b = load_constant(w_tile + k0 * WIDTH + F, w_mask, WHOLE)
            acc_value = dot(a, b, acc_value, WIDE)
    NORM: tl.constexpr = gain is not None
    inverse = None
    if NORM:
        inverse = tl.rsqrt(tl.fma(row_sum(squares, STEPS_K), 1.0 / D, EPS))
    bias_p = None if bias is None else bias + p * WIDTH + columns
    y = activate(affine(acc, inverse, bias_p, inside), ACTIVATION)
    if STATE:
        users = (row0 + m) // tokens
        token = row0 + m - users * tokens
        goal = tl.load(first + users, mask=real, other=0) + token
        written = real & (token < tl.load(length + users, mask=real, other=0)) & (goal < window)
        goal += tl.load(slots + users, mask=real, other=0) * window
        written = written[:, None] & inside[None, :]
        y = narrow(y, out.dtype.element_ty, WIDE)
        begin = goal[:, None] * SPAN  # int64, as slots are: a pool may hold more than 2^31 elements
        if half == 0:
            tl.store(out + begin + n[None, :], y, mask=written)
        else:
            tl.store(v_state + begin + n[None, :], y, mask=written)
    else:
        written = real[:, None] & inside[None, :]
        begin = (p * rows + row0) * F
        at = m[:, None] * F + n[None, :]
        added = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if residual is not None:
            added = tl.load(residual + begin + at, mask=written, other=0.0).to(tl.float32)
        if GATED:
            bias_value = None if bias is None else bias_p + F
            y = tl.fma(y, affine(acc_value, inverse, bias_value, inside), added)
        else:
            y = y + added
        tl.store(out + begin + at, narrow(y, out.dtype.element_ty, WIDE), mask=written)


def signature(
    dtype: str, *, gain: bool = False, bias: bool = False, residual: bool = False, state: bool = False
) -> dict[str, str]:
    """Types of the run-time arguments in order, those that the variant lacks left out.

    Args:
        dtype: Triton's name of the elements, as `bf16`.
        gain: RMSNorm before the product.
        bias: Added after the product.
        residual: Added last.
        state: Rows go into slabs of K and V.
    """
    values = {"x": True, "w": True, "gain": gain, "bias": bias, "residual": residual}
    types = {name: f"*{dtype}" for name, there in values.items() if there}
    types |= dict.fromkeys(("slots", "first", "length"), "*i64") if state else {}
    types |= dict.fromkeys(INTEGERS if state else INTEGERS[:2], "i32")
    return types | dict.fromkeys(("out", "v_state") if state else ("out",), f"*{dtype}")


def constants(
    problem: Problem,
    config: LaunchConfig,
    *,
    x_row: int,
    eps: float,
    gain: bool = False,
    gain_per_position: bool = False,
    bias: bool = False,
    residual: bool = False,
    activation: str | None = None,
    state: bool = False,
) -> dict[str, Any]:
    """Values of the compile-time arguments, and None for the run-time arguments that the variant lacks.

    Args:
        problem: With sizes D, F, P and `gated`, 0 or 1.
        config: Its tiles.
        x_row: Elements between rows of x.
        eps: Added to the mean square.
        gain: As of `signature`, like bias, residual and state.
        gain_per_position: The gain is [P, D].
        bias: See above.
        residual: See above.
        activation: A name in `ACTIVATIONS`, or None.
        state: See above.
    """
    there = signature("", gain=gain, bias=bias, residual=residual, state=state)
    optional = ("gain", "bias", "residual", "slots", "first", "length", "tokens", "window", "v_state")
    return {
        **{name: None for name in optional if name not in there},
        "D": problem["D"],
        "F": problem["F"],
        "X_ROW": x_row,
        "GAIN_POSITION": problem["D"] if gain_per_position else 0,
        "EPS": eps,
        "ACTIVATION": activation,
        "GATED": bool(problem["gated"]),
        "STATE": state,
        "WIDE": interpreted(),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "STEPS_K": config.block_k.bit_length() - 1,
    }


def launch(
    out: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    gain: torch.Tensor | None = None,
    eps: float = 1e-6,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    gated: bool = False,
    config: LaunchConfig | None = None,
) -> None:
    """Fills `out` [P, B, F] with residual + act(RMSNorm(x) @ w + bias).

    Args:
        out: Contiguous.
        x: [P, B, D]; rows may lie apart, as in a chunk of a wider tensor.
        w: [P, D, F], or [P, D, 2F] (gate, then value) where `gated`.
        gain: [D], [P, D] or None.
        eps: Added to the mean square.
        bias: [P, F] ([P, 2F] where `gated`) or None.
        residual: [P, B, F] or None.
        activation: A name in `ACTIVATIONS`, or None.
        gated: Multiply the activated first half by the second half.
        config: Tiles; None chooses them.

    Raises:
        ValueError: Shapes or dtypes that do not belong together.
    """
    P, B, D = x.shape
    F = w.shape[2] // 2 if gated else w.shape[2]
    check_dtypes("mixed_linear", x, w=w, gain=gain, bias=bias, residual=residual, out=out)
    check_shape("w", w, (P, D, 2 * F if gated else F))
    check_shape("gain", gain, (P, D) if gain is not None and gain.dim() == 2 else (D,))
    check_shape("bias", bias, (P, w.shape[2]))
    check_shape("residual", residual, (P, B, F))
    check_shape("out", out, (P, B, F))
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    problem = table.problem("mixed_linear", name_of(x.dtype), B, D=D, F=F, P=P, gated=int(gated))
    config = config or choose(problem, device_of(x.device), default)
    x = in_place(x)
    tensors = {"gain": gain, "bias": bias, "residual": residual}
    launcher(mixed_linear_kernel)[(triton.cdiv(B, config.block_m), triton.cdiv(F, config.block_n), P)](
        x=x,
        w=w.contiguous(),
        **{name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None},
        rows=B,
        x_position=x.stride(0),
        out=out,
        **constants(
            problem,
            config,
            x_row=row_stride(x),
            eps=eps,
            gain=gain is not None,
            gain_per_position=gain is not None and gain.dim() == 2,
            bias=bias is not None,
            residual=residual is not None,
            activation=activation,
        ),
        num_warps=config.warps,
        num_stages=config.stages,
    )


def launch_into_state(
    x: torch.Tensor,
    w: torch.Tensor,
    gain: torch.Tensor | None,
    eps: float,
    bias: torch.Tensor | None,
    k_state: torch.Tensor,
    v_state: torch.Tensor,
    slots: torch.Tensor,
    first: torch.Tensor,
    length: torch.Tensor,
) -> None:
    """Writes rows of `k_state` and `v_state`; see `keys_into_state`. Where a row lies does not change its bits.

    Raises:
        ValueError: Shapes, dtypes or strides that do not belong together.
    """
    _, rows, D = x.shape
    F = w.shape[2]
    U = slots.shape[0]
    check_dtypes("keys_into_state", x, w=w, gain=gain, bias=bias, k_state=k_state, v_state=v_state)
    check_shape("x", x, (1, U * (rows // max(U, 1)), D))
    check_shape("w", w, (1, D, 2 * k_state.shape[2] * k_state.shape[3]))
    check_shape("gain", gain, (1, D) if gain is not None and gain.dim() == 2 else (D,))
    check_shape("bias", bias, (1, F))
    check_shape("v_state", v_state, tuple(k_state.shape))
    for name, tensor in {"slots": slots, "first": first, "length": length}.items():
        check_shape(name, tensor, (U,))
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name} has dtype {tensor.dtype}; keys_into_state takes int64")
    if not (k_state.is_contiguous() and v_state.is_contiguous()):
        raise ValueError("k_state and v_state are written in place and must be contiguous")
    if U == 0:
        return
    problem = table.problem("mixed_linear", name_of(x.dtype), rows, D=D, F=F, P=1, gated=0)
    config = choose(problem, device_of(x.device), default)
    x = in_place(x)
    tensors = {"gain": gain, "bias": bias, "slots": slots, "first": first, "length": length}
    tiles = 2 * triton.cdiv(F // 2, config.block_n)
    launcher(mixed_linear_kernel)[(triton.cdiv(rows, config.block_m), tiles, 1)](
        x=x,
        w=w.contiguous(),
        **{name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None},
        rows=rows,
        x_position=x.stride(0),
        tokens=rows // U,
        window=k_state.shape[1],
        out=k_state,
        v_state=v_state,
        **constants(
            problem, config, x_row=row_stride(x), eps=eps, gain=gain is not None, bias=bias is not None, state=True
        ),
        num_warps=config.warps,
        num_stages=config.stages,
    )


@torch.library.triton_op("onetrans_triton::mixed_linear", mutates_args=())
def mixed_linear_triton(
    x: torch.Tensor,
    w: torch.Tensor,
    gain: torch.Tensor | None = None,
    eps: float = 1e-6,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """The kernel as an op that captures see into; see `launch`."""
    out = x.new_empty((x.shape[0], x.shape[1], w.shape[2]))
    launch(out, x, w, gain, eps, bias, residual, activation=activation)
    return out


@torch.library.triton_op("onetrans_triton::keys_into_state", mutates_args=("k_state", "v_state"))
def keys_into_state_triton(
    x: torch.Tensor,
    w: torch.Tensor,
    gain: torch.Tensor | None,
    eps: float,
    bias: torch.Tensor | None,
    k_state: torch.Tensor,
    v_state: torch.Tensor,
    slots: torch.Tensor,
    first: torch.Tensor,
    length: torch.Tensor,
) -> None:
    """The kernel as an op that captures see into; see `launch_into_state`."""
    launch_into_state(x, w, gain, eps, bias, k_state, v_state, slots, first, length)
