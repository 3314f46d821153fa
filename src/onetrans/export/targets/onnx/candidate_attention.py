"""Lowers candidate_attention: all candidates' query rows of a user against that user's K/V, read once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnxscript import opset23 as op

from onetrans.export.targets.onnx.common import (
    MASKED,
    Value,
    additive,
    floats,
    heads_first,
    ints,
    keys_transposed,
    positions,
    shape,
    size,
)


def candidate_attention(
    q: Value,
    k: Value,
    v: Value,
    keys: Sequence[Value],
    values: Sequence[Value],
    lengths: Sequence[Value],
    slots: Value | None = None,
) -> Value:
    """One softmax over the user's segments and the own causal block; see `onetrans.kernels.candidate_attention`."""
    assert slots is None  # this target's states come one after another, without a pool
    P, H, E = int(q.shape[0]), int(keys[0].shape[2]), int(keys[0].shape[3])
    U = size(keys[0], 0)
    split_heads = shape(P, U, -1, H, E)

    def heads(x: Value) -> Value:  # [P, U·C, H·E] to [U, H, C, P, E]
        return op.Transpose(op.Reshape(x, split_heads), perm=[1, 3, 2, 0, 4])

    def blocks(x: Value) -> Value:  # [U, H, C, P, E] to [U·H·C, P, E]
        return op.Reshape(x, ints(-1, P, E))

    q_UHCPE, k_UHCPE, v_UHCPE = heads(q), heads(k), heads(v)
    own = op.MatMul(blocks(q_UHCPE), op.Transpose(blocks(k_UHCPE), perm=[0, 2, 1]))
    key, value = (part[0] if len(part) == 1 else op.Concat(*part, axis=1) for part in (keys, values))
    W = size(key, 1)
    rows = op.Reshape(q_UHCPE, shape(U, H, -1, E))
    on_user = op.MatMul(rows, keys_transposed(key, H, E))
    scores = op.Concat(op.Reshape(on_user, shape(U, H, -1, P, W)), op.Reshape(own, shape(U, H, -1, P, P)), axis=-1)
    weights = op.Softmax(op.Add(scores, _mask(keys, lengths, P)), axis=-1)
    # Zero rows for the own block: slicing the weights [U, H, C·P, W] instead would copy them (7 of 147 ms).
    zeros = op.Expand(floats(0.0), shape(U, H, P, E))
    full = op.Reshape(weights, shape(U, H, -1, op.Add(W, ints(P))))
    out = op.Reshape(op.MatMul(full, op.Concat(heads_first(value), zeros, axis=2)), shape(U, H, -1, P, E))
    own_weights = op.Slice(weights, W, op.Add(W, ints(P)), ints(-1))
    out = op.Add(out, op.MatMul(own_weights, v_UHCPE))
    return op.Reshape(op.Transpose(out, perm=[3, 0, 2, 1, 4]), op.Shape(q))


def _mask(keys: Sequence[Value], lengths: Sequence[Value], P: int) -> Value:
    """Additive mask [U, 1, 1, P, W + P]: the valid tokens of each segment, then the causal own block."""
    masks = []
    for key, length in zip(keys, lengths, strict=True):
        valid = op.Unsqueeze(op.Less(positions(size(key, 1)), op.Unsqueeze(length, ints(1))), ints(1, 2, 3))
        masks.append(op.Expand(additive(valid), ints(1, 1, 1, P, 1)))
    causal = np.where(np.tril(np.ones((P, P), dtype=bool)), 0.0, MASKED)
    masks.append(op.Expand(floats(causal[None, None, None]), shape(size(keys[0], 0), 1, 1, P, P)))
    return op.Concat(*masks, axis=-1)
