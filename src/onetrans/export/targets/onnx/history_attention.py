"""Lowers history_attention: the Attention operator in a prefill; two segments, the past uncopied, in an append."""

from __future__ import annotations

from onnxscript import opset23 as op

from onetrans.export.targets.onnx.common import (
    MASKED,
    Value,
    floats,
    heads_first,
    ints,
    keys_transposed,
    pieces,
    positions,
    size,
)


def history_attention(
    q: Value,
    k: Value,
    v: Value,
    q_start: Value,
    length: Value,
    past_k: Value | None = None,
    past_v: Value | None = None,
    past_length: Value = None,
) -> Value:
    """Lower-right causal attention of q [U, Nq, H, E]; see `onetrans.kernels.history_attention`.

    The valid length is implied by causality for every row that is read.
    """
    H, E = int(q.shape[2]), int(q.shape[3])
    last = op.Add(op.Unsqueeze(q_start, ints(1)), positions(size(q, 1)))
    visible = op.LessOrEqual(positions(size(k, 1)), op.Unsqueeze(last, ints(1, 3)))
    if past_k is None:
        q_UND, k_UND, v_UND = (op.Reshape(x, ints(0, 0, H * E)) for x in (q, k, v))
        out = op.Attention(q_UND, k_UND, v_UND, visible, q_num_heads=H, kv_num_heads=H, scale=1.0)[0]
        return op.Reshape(out, ints(0, 0, H, E))
    valid = op.Less(positions(size(past_k, 1)), op.Unsqueeze(past_length, ints(1, 2, 3)))
    rows = heads_first(q)
    past = op.Where(valid, op.MatMul(rows, keys_transposed(past_k, H, E)), floats(MASKED))
    new = op.Where(visible, op.MatMul(rows, keys_transposed(k, H, E)), floats(MASKED))
    weights = op.Softmax(op.Concat(past, new, axis=-1), axis=-1)
    on_past, on_new = pieces(weights, [size(past_k, 1), size(k, 1)])
    out = op.Add(op.MatMul(on_past, heads_first(past_v)), op.MatMul(on_new, heads_first(v)))
    return op.Transpose(out, perm=[0, 2, 1, 3])
