"""Small device functions that the Triton kernels share.

Sums of products that must not depend on the kernel around them are written as explicit fused multiply-adds: a compiler
that contracts a * b + c in one kernel and not in another would change the last bit of a score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x · log2 e); exp2 is one instruction


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU (`TRITON_INTERPRET=1`)."""
    return bool(triton.knobs.runtime.interpret)


def head_parts(E: int) -> tuple[int, int]:
    """A head dimension as one or two powers of two, of at least 16: 96 is 64 + 32, and is not padded to 128.

    Raises:
        ValueError: It is neither.
    """
    main = 1 << (E.bit_length() - 1)
    rest = E - main
    if main < 16 or (rest and (rest < 16 or rest & (rest - 1))):
        raise ValueError(
            f"head_dim is {E}; the kernels take 16 to 128 that are one or two powers of two, as 96 = 64 + 32"
        )
    return main, rest


def name_of(dtype: torch.dtype) -> str:
    """Its name, as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def token_stride(name: str, x: torch.Tensor, E: int) -> int:
    """Elements between tokens of x [U, N, H, E], whose heads are contiguous and users a whole number of tokens apart.

    Where there is one token it is H · E, whatever the strides say, so that it makes no variant of its own.

    Raises:
        ValueError: It lies otherwise.
    """
    user, token, head, element = x.stride()
    users, tokens, heads, _ = x.shape
    if tokens == 1:
        token = user if users > 1 else heads * E
    if x.shape[3] != E or (head, element) != (E, 1) or token < heads * E or (users > 1 and user % token):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and strides {x.stride()}; a token's heads must be contiguous, of {E}"
            " elements each, and users a whole number of tokens apart: call .contiguous()"
        )
    return token


def capacity(x: torch.Tensor, token: int) -> int:
    """Tokens from one user of x [U, N, H, E] to the next, of `token` elements each; N where there is one user."""
    return x.stride(0) // token if x.shape[0] > 1 else x.shape[1]


@triton.jit
def dot(a, b, acc, WIDE: tl.constexpr):
    """acc + a @ b in float32. WIDE widens the operands first: the interpreter's product of bfloat16 is wrong."""
    # Widening changes no product: those of two bfloat16 or float16 values, 16 or 22 bits, are exact in float32.
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")  # for float32 operands: the default is TF32, of 10 mantissa bits


@triton.jit
def softmax_step(scores, m, total):
    """Takes one tile of scores into an online softmax; rows that have seen nothing yet stay at m = -inf, total = 0.

    Returns the tile's weights, the new maximum and total, and the factor for what was summed before.
    """
    m_new = tl.maximum(m, tl.max(scores, 1))
    # A row that has seen nothing has m_new = -inf, and -inf - -inf is NaN; against 0 its weights are exp2(-inf) = 0.
    top = tl.where(m_new == float("-inf"), 0.0, m_new)
    # exp(score - top) with one rounding less: the multiplication by log2 e and the difference are one fma.
    weights = tl.exp2(tl.fma(scores, LOG2E, (top * -LOG2E)[:, None]))
    factor = tl.exp2((m - top) * LOG2E)  # exactly 1 where the tile holds nothing new, so that such tiles do not count
    return weights, m_new, tl.fma(total, factor, tl.sum(weights, 1)), factor


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The named activation in float32; gelu is the exact erf form."""
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def narrow(x, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """x in float32 rounded to the nearest of DTYPE. WIDE rounds by hand: the interpreter cuts bfloat16 off."""
    if WIDE and DTYPE.is_bf16():
        # Just under half a unit in the last place, plus the last bit that is kept: ties carry only into odd values.
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def row_sum(x, STEPS: tl.constexpr):
    """Sums of the rows of x [M, 2^STEPS] as a tree of pairs.

    tl.sum's order follows the layout of the tile, which follows the alignment of the pointer that it was loaded from:
    a row alone at an odd address would have another last bit. A pair has one sum.
    """
    M: tl.constexpr = x.shape[0]
    # Each step halves the columns: [M, 2^s] as [M, 2^(s-1), 2], neighbours added. Static, so that shapes are constants.
    for step in tl.static_range(0, STEPS):
        x = tl.sum(tl.reshape(x, (M, 1 << (STEPS - 1 - step), 2)), 2)
    return tl.reshape(x, (M,))


def launcher(kernel: Any) -> Any:
    """What launches a kernel: through `wrap_triton`, so that a capture sees it; as it is under the interpreter."""
    catch = _catch.get()
    if catch is not None:
        return _Caught(kernel, catch)
    return kernel if interpreted() else torch.library.wrap_triton(kernel)


@contextmanager
def caught(catch: Callable[[Any, dict[str, Any]], None]) -> Iterator[None]:
    """Within, launches do not happen: `catch` gets the kernel and its arguments by name, launch options among them."""
    token = _catch.set(catch)
    try:
        yield
    finally:
        _catch.reset(token)


_catch: ContextVar[Callable[[Any, dict[str, Any]], None] | None] = ContextVar("catch", default=None)


class _Caught:
    def __init__(self, kernel: Any, catch: Callable[[Any, dict[str, Any]], None]) -> None:
        self.kernel, self.catch = kernel, catch

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **given: Any) -> None:
            self.catch(self.kernel, {**dict(zip(self.kernel.arg_names, args, strict=False)), **given})

        return launch
