"""Where kernels are tested: on the GPU where there is one, else in Triton's interpreter on the CPU; and how closely."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import pytest
import torch

from onetrans.parity import bound as parity
from onetrans.precision import of_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

HALVES = [torch.bfloat16, torch.float16]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton (Linux)")


def fuse_multiply_add() -> None:
    """Gives the interpreter a multiply-add that rounds once, as hardware does; its own rounds twice.

    Twice-rounded sums agree by luck where a device's would not: exp2(fma(m, c, -m * c)) is 1 with them, and there not.
    """
    from triton.runtime import interpreter

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        wide = np.promote_types(x.data.dtype, np.float64)
        once = (x.data.astype(wide) * y.data.astype(wide) + z.data.astype(wide)).astype(x.data.dtype)
        return interpreter.TensorHandle(once, x.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma  # type: ignore[method-assign]


def round_products_once() -> None:
    """Gives the interpreter products of tiles that round once, from float64; its own are the BLAS library's.

    On some processors (OpenBLAS 0.3.31's Haswell kernels) a row's float32 product has other bits at another place in
    the tile, which no tensor core does: the tests of bits would judge the library.
    """
    from triton.runtime import interpreter

    own = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if d.data.dtype != np.float32:
            return own(self, a, b, d, *options)
        product = np.matmul(a.data, b.data, dtype=np.float64)
        return interpreter.TensorHandle(product.astype(np.float32) + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot  # type: ignore[method-assign]


if DEVICE == "cpu" and importlib.util.find_spec("triton") is not None:
    fuse_multiply_add()
    round_products_once()


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor full of NaN: what is not written, or read beyond its bounds, shows."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def bound(plain: torch.Tensor, gold: torch.Tensor, summed: torch.Tensor) -> float:
    """What a kernel may be off by: the bound of `onetrans.parity.bound` with one more rounding for its floor.

    A kernel rounds what it multiplies (softmax weights, normalised rows) to the dtype where the reference keeps
    float32; each term is then off by half an ulp at most, so a mean of `summed` by half an ulp of the largest.
    """
    error = float((plain.double() - gold).abs().max())
    return parity.bound(error, float(summed.abs().max()), of_torch(plain.dtype).name, ulps=0.5)
