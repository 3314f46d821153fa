"""Lowers take_rows: one gather with the user as its batch axis, so that no flat index and no copy of x is made."""

from __future__ import annotations

from onnxscript import opset23 as op

from onetrans.export.targets.onnx.common import Value, integer, ints, size


def take_rows(x: Value, start: Value, rows: Value | int) -> Value:
    """Rows start[u] … start[u] + rows - 1 of x [U, N, D]; see `onetrans.kernels.take_rows`."""
    count = integer(rows) if isinstance(rows, int) else rows
    row = op.Add(op.Unsqueeze(start, ints(1)), op.Range(integer(0), count, integer(1)))
    last = op.Sub(size(x, 1), ints(1))
    return op.GatherND(x, op.Unsqueeze(op.Min(row, last), ints(2)), batch_dims=1)
