"""mixed_ffn in Triton: two launches of mixed_linear, or one kernel that keeps the hidden columns to itself."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from onetrans.kernels.activations import ACTIVATIONS
from onetrans.kernels.jit import activate, dot, interpreted, launcher, name_of, narrow, row_sum
from onetrans.kernels.launch import LaunchConfig, Problem, choose, table
from onetrans.kernels.launch.device import device_of
from onetrans.kernels.mixed_ffn.configs import default, parts
from onetrans.kernels.mixed_linear import kernel as linear
from onetrans.kernels.mixed_linear.arguments import check_dtypes, check_shape, in_place, row_stride
from onetrans.kernels.mixed_linear.kernel import affine, load_constant

INTEGERS = ("rows", "x_position")


@triton.jit
def _chunk(x_rows, gain, d, real, WIDE: tl.constexpr):
    """x * gain of a tile's columns d in x's dtype, and x itself in float32."""
    x = tl.load(x_rows[:, None] + d[None, :], mask=real[:, None], other=0.0)
    wide = x.to(tl.float32)
    scale = tl.load(gain + d).to(tl.float32)
    return narrow(wide * scale[None, :], x.dtype, WIDE), wide


@triton.jit
def _up(chunks, w, n, inside, inverse, bias, WIDTH: tl.constexpr, WHOLE: tl.constexpr, WIDE: tl.constexpr):
    """Columns n of RMSNorm(x) @ w1 + b1 in float32; `chunks` are x * gain, a few columns each."""
    M: tl.constexpr = chunks[0].shape[0]
    K: tl.constexpr = chunks[0].shape[1]
    k = tl.arange(0, K)
    at = w + k[:, None] * WIDTH + n[None, :]
    h = tl.zeros((M, n.shape[0]), tl.float32)
    for c in tl.static_range(0, len(chunks)):
        h = dot(chunks[c], load_constant(at + c * K * WIDTH, inside[None, :], WHOLE), h, WIDE)
    return affine(h, inverse, None if bias is None else bias + n, inside)


@triton.jit
def _finish(out, x_rows, b2, acc, d, begin, m, real, D: tl.constexpr, WIDE: tl.constexpr):
    """Stores x + acc + b2 of columns d."""
    mask = real[:, None]
    y = affine(acc, None, None if b2 is None else b2 + d, d < D)
    y += tl.load(x_rows[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + begin + m[:, None] * D + d[None, :], narrow(y, out.dtype.element_ty, WIDE), mask=mask)


@triton.jit(do_not_specialize=INTEGERS)
def mixed_ffn_kernel(
    x, w1, w2, gain, b1, b2, rows, x_position, out,
    F: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr,
    X_ROW: tl.constexpr, GAIN_POSITION: tl.constexpr, EPS: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [P, rows, D] = x + act(RMSNorm(x) @ w1 + b1) @ w2 + b2, with D = MAIN + REST.

    X_ROW and x_position are the elements between x's rows and positions; all else is contiguous.
    """
    D: tl.constexpr = MAIN + REST
    WIDTH: tl.constexpr = 2 * F if GATED else F
    WHOLE: tl.constexpr = F % BLOCK_N == 0
    p = tl.program_id(1).to(tl.int64)
    row0 = tl.program_id(0) * BLOCK_M
    m = tl.arange(0, BLOCK_M)
    real = m < rows - row0
    position = p * x_position
    if X_ROW % 8 == 0:  # see `in_place`
        position = tl.multiple_of(position, 8)
    x_rows = x + position + row0.to(tl.int64) * X_ROW + m * X_ROW
    gain += p * GAIN_POSITION
    chunks = ()  # of few columns, since a thread holds all of one at a time
    squares = tl.zeros((BLOCK_M, CHUNK), tl.float32)
    for c in tl.static_range(0, D // CHUNK):
        chunk, wide = _chunk(x_rows, gain, c * CHUNK + tl.arange(0, CHUNK), real, WIDE)
        squares = tl.fma(wide, wide, squares)
        chunks = chunks + (chunk,)  # type: ignore[assignment]  # noqa: RUF005
    inverse = tl.rsqrt(tl.fma(row_sum(squares, STEPS), 1.0 / D, EPS))
    d0 = tl.arange(0, MAIN)
    acc0 = tl.zeros((BLOCK_M, MAIN), tl.float32)
    if REST > 0:
        d1 = MAIN + tl.arange(0, REST)
        acc1 = tl.zeros((BLOCK_M, REST), tl.float32)
    w1 += p * (D * WIDTH)
    w2 += p * (F * D)
    bias = None if b1 is None else b1 + p * WIDTH
    bias_value = None if b1 is None else b1 + p * WIDTH + F
    for f0 in range(0, F, BLOCK_N):
        n = f0 + tl.arange(0, BLOCK_N)
        inside = n < F
        h = activate(_up(chunks, w1, n, inside, inverse, bias, WIDTH, WHOLE, WIDE), ACTIVATION)
        if GATED:
            h *= _up(chunks, w1 + F, n, inside, inverse, bias_value, WIDTH, WHOLE, WIDE)
        h = narrow(h, x.dtype.element_ty, WIDE)  # as two launches would store it, and as the matrix unit takes it
        down = w2 + n[:, None] * D
        acc0 = dot(h, load_constant(down + d0[None, :], inside[:, None], WHOLE), acc0, WIDE)
        if REST > 0:
            acc1 = dot(h, load_constant(down + d1[None, :], inside[:, None], WHOLE), acc1, WIDE)
    begin = (p * rows + row0) * D
    bias_out = None if b2 is None else b2 + p * D
    _finish(out, x_rows, bias_out, acc0, d0, begin, m, real, D, WIDE)
    if REST > 0:
        _finish(out, x_rows, bias_out, acc1, d1, begin, m, real, D, WIDE)


def signature(dtype: str, *, b1: bool = False, b2: bool = False) -> dict[str, str]:
    """Types of the fused kernel's run-time arguments in order, biases that the variant lacks left out."""
    there = {"x": True, "w1": True, "w2": True, "gain": True, "b1": b1, "b2": b2}
    types = {name: f"*{dtype}" for name, is_there in there.items() if is_there}
    return {**types, **dict.fromkeys(INTEGERS, "i32"), "out": f"*{dtype}"}


def constants(
    problem: Problem,
    config: LaunchConfig,
    *,
    x_row: int,
    eps: float,
    activation: str,
    gain_per_position: bool = False,
    b1: bool = False,
    b2: bool = False,
) -> dict[str, Any]:
    """Values of the fused kernel's compile-time arguments, and None for absent biases.

    Args:
        problem: With sizes D, F, P and `gated`, 0 or 1.
        config: Its tiles.
        x_row: Elements between rows of x.
        eps: Added to the mean square.
        activation: A name in `ACTIVATIONS`.
        gain_per_position: The gain is [P, D].
        b1: There is a bias before the activation.
        b2: There is a bias after the second product.

    Raises:
        ValueError: The fused kernel does not take this D.
    """
    main, rest = parts(problem["D"])
    chunk = min(64, rest or main)
    return {
        **{name: None for name, there in {"b1": b1, "b2": b2}.items() if not there},
        "F": problem["F"],
        "MAIN": main,
        "REST": rest,
        "CHUNK": chunk,
        "STEPS": chunk.bit_length() - 1,
        "X_ROW": x_row,
        "GAIN_POSITION": problem["D"] if gain_per_position else 0,
        "EPS": eps,
        "ACTIVATION": activation,
        "GATED": bool(problem["gated"]),
        "WIDE": interpreted(),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }


def launch(
    out: torch.Tensor,
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    activation: str,
    gated: bool,
    b1: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    *,
    config: LaunchConfig | None = None,
) -> None:
    """Fills `out` [P, B, D], contiguous; the other arguments are those of `mixed_ffn_reference`.

    Args:
        out: Written.
        x: Rows may lie apart, as in a chunk of a wider tensor.
        w1: Up-projection.
        w2: Down-projection.
        gain: RMSNorm gain.
        eps: Added to the mean square.
        activation: A name in `ACTIVATIONS`.
        gated: Multiply the activated first half by the second half.
        b1: [P, F] ([P, 2F] where `gated`) or None.
        b2: [P, D] or None.
        config: Whether and in which tiles to fuse; None chooses.

    Raises:
        ValueError: Shapes or dtypes that do not belong together, or a fused `config` for a D that it cannot take.
    """
    P, B, D = x.shape
    F = w2.shape[1]
    check_dtypes("mixed_ffn", x, w1=w1, w2=w2, gain=gain, b1=b1, b2=b2, out=out)
    check_shape("w1", w1, (P, D, 2 * F if gated else F))
    check_shape("w2", w2, (P, F, D))
    check_shape("gain", gain, (P, D) if gain.dim() == 2 else (D,))
    check_shape("b1", b1, (P, w1.shape[2]))
    check_shape("b2", b2, (P, D))
    check_shape("out", out, (P, B, D))
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    problem = table.problem("mixed_ffn", name_of(x.dtype), B, D=D, F=F, P=P, gated=int(gated))
    config = config or choose(problem, device_of(x.device), default)
    if not config.fused:
        hidden = x.new_empty((P, B, F))
        linear.launch(hidden, x, w1, gain, eps, b1, activation=activation, gated=gated)
        linear.launch(out, hidden, w2, bias=b2, residual=x)
        return
    x = in_place(x)
    biases = {name: bias.contiguous() for name, bias in {"b1": b1, "b2": b2}.items() if bias is not None}
    launcher(mixed_ffn_kernel)[(triton.cdiv(B, config.block_m), P)](
        x=x,
        w1=w1.contiguous(),
        w2=w2.contiguous(),
        gain=gain.contiguous(),
        **biases,
        rows=B,
        x_position=x.stride(0),
        out=out,
        **constants(
            problem,
            config,
            x_row=row_stride(x),
            eps=eps,
            activation=activation,
            gain_per_position=gain.dim() == 2,
            b1=b1 is not None,
            b2=b2 is not None,
        ),
        num_warps=config.warps,
        num_stages=config.stages,
    )


@torch.library.triton_op("onetrans_triton::mixed_ffn", mutates_args=())
def mixed_ffn_triton(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    activation: str,
    gated: bool,
    b1: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernels as an op that captures see into; see `launch`."""
    out = x.new_empty(x.shape)
    launch(out, x, w1, w2, gain, eps, activation, gated, b1, b2)
    return out
