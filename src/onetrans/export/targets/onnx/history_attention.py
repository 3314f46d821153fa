"""Lowers history_attention: the Attention operator in a prefill; two segments, the past uncopied, in an append."""

from __future__ import annotations

from onnxscript import opset23 as op

from onetrans.export.targets.onnx.common import Value, additive, ints, pieces, positions, size


def history_attention(
    q: Value,
    k: Value,
    v: Value,
    q_start: Value,
    past_k: Value | None = None,
    past_v: Value | None = None,
    past_length: Value = None,
) -> Value:
    """Lower-right causal attention of q [U, H, Nq, E]; see `onetrans.kernels.history_attention`."""
    last = op.Add(op.Unsqueeze(q_start, ints(1)), positions(size(q, 2)))
    visible = op.LessOrEqual(positions(size(k, 2)), op.Unsqueeze(last, ints(1, 3)))
    if past_k is None:
        return op.Attention(q, k, v, visible, scale=1.0)[0]
    valid = op.Less(positions(size(past_k, 2)), op.Unsqueeze(past_length, ints(1)))
    past = op.Add(op.MatMul(q, op.Transpose(past_k, perm=[0, 1, 3, 2])), op.Unsqueeze(additive(valid), ints(1, 2)))
    new = op.Add(op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2])), additive(visible))
    weights = op.Softmax(op.Concat(past, new, axis=-1), axis=-1)
    on_past, on_new = pieces(weights, [size(past_k, 2), size(k, 2)])
    return op.Add(op.MatMul(on_past, past_v), op.MatMul(on_new, v))
