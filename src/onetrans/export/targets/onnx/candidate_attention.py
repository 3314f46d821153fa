"""Lowers candidate_attention: all candidates' query rows of a user against that user's K/V, read once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnxscript import opset23 as op
from onnxscript.onnx_types import FLOAT, INT64

from onetrans.export.targets.onnx.common import MASKED, additive, floats, ints, pieces, positions, shape, size


def candidate_attention(
    q: FLOAT, k: FLOAT, v: FLOAT, keys: Sequence[FLOAT], values: Sequence[FLOAT], lengths: Sequence[INT64]
) -> FLOAT:
    """One softmax over the user's segments and the own causal block; see `onetrans.kernels.candidate_attention`."""
    P, H, E = int(q.shape[0]), int(keys[0].shape[1]), int(keys[0].shape[3])
    U = size(keys[0], 0)
    split_heads = shape(P, U, -1, H, E)

    def heads(x: FLOAT) -> FLOAT:  # [P, U·C, H·E] to [U, H, C, P, E]
        return op.Transpose(op.Reshape(x, split_heads), perm=[1, 3, 2, 0, 4])

    q_UHCPE, k_UHCPE, v_UHCPE = heads(q), heads(k), heads(v)
    rows = op.Reshape(q_UHCPE, shape(U, H, -1, E))
    scores, masks, widths = [], [], []
    for key, length in zip(keys, lengths, strict=True):
        W = size(key, 2)
        segment = op.MatMul(rows, op.Transpose(key, perm=[0, 1, 3, 2]))
        scores.append(op.Reshape(segment, shape(U, H, -1, P, W)))
        valid = op.Unsqueeze(op.Less(positions(W), op.Unsqueeze(length, ints(1))), ints(1, 2, 3))
        masks.append(op.Expand(additive(valid), ints(1, 1, 1, P, 1)))
        widths.append(W)
    scores.append(op.MatMul(q_UHCPE, op.Transpose(k_UHCPE, perm=[0, 1, 2, 4, 3])))
    causal = np.where(np.tril(np.ones((P, P), dtype=bool)), 0.0, MASKED)
    masks.append(op.Expand(floats(causal[None, None, None]), shape(U, 1, 1, P, P)))
    widths.append(ints(P))
    weights = op.Softmax(op.Add(op.Concat(*scores, axis=-1), op.Concat(*masks, axis=-1)), axis=-1)
    parts = pieces(weights, widths)
    out = op.MatMul(parts[-1], v_UHCPE)
    for part, value in zip(parts[:-1], values, strict=True):
        on_user = op.MatMul(op.Reshape(part, shape(U, H, -1, size(value, 2))), value)
        out = op.Add(out, op.Reshape(on_user, shape(U, H, -1, P, E)))
    return op.Reshape(op.Transpose(out, perm=[3, 0, 2, 1, 4]), op.Shape(q))
