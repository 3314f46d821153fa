"""Lowers mixed_ffn."""

from __future__ import annotations

from onnxscript import opset23 as op

from onetrans.export.targets.onnx.common import Value, activate, ints, pieces
from onetrans.export.targets.onnx.mixed_linear import project, rms_norm


def mixed_ffn(
    x: Value,
    w1: Value,
    w2: Value,
    gain: Value,
    eps: float,
    activation: str,
    gated: bool,
    b1: Value | None = None,
    b2: Value | None = None,
) -> Value:
    """x + act(RMSNorm(x) @ w1 + b1) @ w2 + b2; see `onetrans.kernels.mixed_ffn`."""
    h = project(rms_norm(x, gain, eps, len(gain.shape) == 2), w1)
    if b1 is not None:
        h = op.Add(h, op.Unsqueeze(b1, ints(1)))
    if gated:
        half = ints(int(w2.shape[1]))
        gate, value = pieces(h, [half, half])
        h = op.Mul(activate(gate, activation), value)
    else:
        h = activate(h, activation)
    y = project(h, w2)
    if b2 is not None:
        y = op.Add(y, op.Unsqueeze(b2, ints(1)))
    return op.Add(x, y)
