"""Lowers mixed_linear: activations stay token-major, so that each is one batched MatMul."""

from __future__ import annotations

import numpy as np
from onnxscript import opset23 as op

from onetrans.export.targets.onnx.common import Value, activate, floats, ints


def rms_norm(x: Value, gain: Value, eps: float, per_position: bool) -> Value:
    """x [P, B, D] over its root mean square, times gain [D] or [P, D]; statistics in float32."""
    if not per_position:
        return op.RMSNormalization(x, gain, axis=-1, epsilon=eps, stash_type=1)
    ones = floats(np.ones(int(gain.shape[1])))
    return op.Mul(op.RMSNormalization(x, ones, axis=-1, epsilon=eps, stash_type=1), op.Unsqueeze(gain, ints(1)))


def project(x: Value, w: Value) -> Value:
    """x [P, B, D] @ w [P, D, F]; one shared set of weights goes as a plain matrix, which runtimes prepack."""
    return op.MatMul(x, op.Squeeze(w, ints(0)) if w.shape[0] == 1 else w)


def mixed_linear(
    x: Value,
    w: Value,
    gain: Value | None = None,
    eps: float = 1e-6,
    bias: Value | None = None,
    residual: Value | None = None,
    activation: str | None = None,
) -> Value:
    """residual + act(RMSNorm(x) @ w + bias); see `onetrans.kernels.mixed_linear`."""
    if gain is not None:
        x = rms_norm(x, gain, eps, len(gain.shape) == 2)
    y = project(x, w)
    if bias is not None:
        y = op.Add(y, op.Unsqueeze(bias, ints(1)))
    if activation is not None:
        y = activate(y, activation)
    return y if residual is None else op.Add(residual, y)
