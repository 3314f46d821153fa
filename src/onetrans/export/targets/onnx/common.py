"""Small pieces that several lowerings share."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from onnxscript import ir
from onnxscript import opset23 as op

Value: TypeAlias = Any  # a value of the graph under construction; onnxscript types these by dtype, not as one class

MASKED = -1e30  # finite, so that a row with nothing to see stays finite; softmax makes it an exact 0


def ints(*values: int) -> Value:
    """A constant [n]."""
    return op.Constant(value_ints=list(values))


def floats(array: np.ndarray | float) -> Value:
    """A float32 constant."""
    return op.Constant(value=ir.to_proto(ir.tensor(np.asarray(array, dtype=np.float32))))


def integer(value: int) -> Value:
    """A constant scalar."""
    return op.Constant(value_int=value)


def size(x: Value, axis: int) -> Value:
    """The size of one axis, [1]."""
    return op.Shape(x, start=axis, end=axis + 1)


def positions(count: Value) -> Value:
    """0 … count - 1 for a size [1]."""
    return op.Range(integer(0), op.Squeeze(count, ints(0)), integer(1))


def additive(visible: Value) -> Value:
    """0 where visible, MASKED elsewhere."""
    return op.Where(visible, floats(0.0), floats(MASKED))


def shape(*parts: Value | int) -> Value:
    """A shape made of sizes [1] and plain integers."""
    return op.Concat(*(ints(part) if isinstance(part, int) else part for part in parts), axis=0)


def pieces(x: Value, widths: list[Value]) -> list[Value]:
    """Cuts the last axis into pieces of the given sizes [1]."""
    cut, begin = [], ints(0)
    for width in widths:
        end = op.Add(begin, width)
        cut.append(op.Slice(x, begin, end, ints(-1)))
        begin = end
    return cut


def heads_first(x: Value) -> Value:
    """x [U, W, H, E] as [U, H, W, E]."""
    return op.Transpose(x, perm=[0, 2, 1, 3])


def keys_transposed(key: Value, H: int, E: int) -> Value:
    """key [U, W, H, E] as [U, H, E, W], in two steps that no optimiser joins.

    ONNX Runtime takes the second into the product; one transposition to [U, H, E, W] it would carry out, slowly.
    """
    by_head = op.Reshape(heads_first(key), ints(0, H, -1, E))
    return op.Transpose(by_head, perm=[0, 1, 3, 2])


def activate(x: Value, activation: str) -> Value:
    """The named activation; gelu is the exact erf form."""
    if activation == "gelu":
        return op.Gelu(x)
    if activation == "silu":
        return op.Mul(x, op.Sigmoid(x))
    if activation == "relu":
        return op.Relu(x)
    raise ValueError(f"the onnx target has no lowering for activation {activation!r}")
