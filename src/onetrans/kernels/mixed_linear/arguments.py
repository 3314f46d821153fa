"""What the kernels of mixed_linear and mixed_ffn ask of their tensors."""

from __future__ import annotations

import torch

from onetrans.kernels.define import HALF
from onetrans.kernels.jit import interpreted


def check_dtypes(op: str, x: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Asks for float16 or bfloat16 throughout; the interpreter takes float32 too.

    Raises:
        ValueError: Another dtype, or two.
    """
    if x.dtype not in HALF and not (interpreted() and x.dtype == torch.float32):
        raise ValueError(f"x has dtype {x.dtype}; the Triton kernel of {op} takes float16 and bfloat16")
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype} and x {x.dtype}; {op} takes one dtype")


def check_shape(name: str, tensor: torch.Tensor | None, expected: tuple[int, ...]) -> None:
    """Asks for a shape, of a tensor that is there.

    Raises:
        ValueError: It has another.
    """
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {expected}")


def in_place(x: torch.Tensor) -> torch.Tensor:
    """x [P, B, D] where kernels can read it as it lies, else a copy.

    A row must be contiguous; where rows start at multiples of 8 elements positions must too, which the kernels take for
    granted, so that they load 16 bytes at once.
    """
    row_is_contiguous = x.stride(2) == 1 or x.shape[2] == 1
    aligned = row_stride(x) % 8 != 0 or x.shape[0] == 1 or x.stride(0) % 8 == 0
    return x if row_is_contiguous and aligned else x.contiguous()


def row_stride(x: torch.Tensor) -> int:
    """Elements between rows of x [P, B, D]; a single row's is D, whatever its strides say, so that it is no variant."""
    return x.stride(1) if x.shape[1] > 1 else x.shape[2]
