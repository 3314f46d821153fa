"""Lowers history_attention: the Attention operator, over past and new tokens one after another in an append."""

from __future__ import annotations

from onnxscript import opset23 as op

from onetrans.export.targets.onnx.common import Value, ints, positions, size


def history_attention(
    q: Value,
    k: Value,
    v: Value,
    q_start: Value,
    length: Value,
    past_k: Value | None = None,
    past_v: Value | None = None,
    past_length: Value = None,
    slots: Value | None = None,
) -> Value:
    """Lower-right causal attention of q [U, Nq, H, E]; see `onetrans.kernels.history_attention`.

    The valid length is implied by causality for every row that is read.
    """
    assert slots is None  # this target's states come one after another, without a pool
    H, E = int(q.shape[2]), int(q.shape[3])
    last = op.Add(op.Unsqueeze(q_start, ints(1)), positions(size(q, 1)))
    visible = op.LessOrEqual(positions(size(k, 1)), op.Unsqueeze(last, ints(1, 3)))
    if past_k is not None:
        valid = op.Less(positions(size(past_k, 1)), op.Unsqueeze(past_length, ints(1, 2, 3)))
        everywhere = op.Unsqueeze(op.GreaterOrEqual(last, ints(0)), ints(1, 3))
        visible = op.Concat(op.And(valid, everywhere), visible, axis=-1)
        k, v = op.Concat(past_k, k, axis=1), op.Concat(past_v, v, axis=1)
    q_UND, k_UND, v_UND = (op.Reshape(x, ints(0, 0, H * E)) for x in (q, k, v))
    out = op.Attention(q_UND, k_UND, v_UND, visible, q_num_heads=H, kv_num_heads=H, scale=1.0)[0]
    return op.Reshape(out, ints(0, 0, H, E))
