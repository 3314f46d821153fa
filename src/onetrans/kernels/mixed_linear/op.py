"""mixed_linear: a projection with weights by the token's position, RMSNorm before, activation and residual after."""

from __future__ import annotations

import torch

from onetrans.kernels.activations import ACTIVATIONS
from onetrans.kernels.autograd import compute_dtype
from onetrans.kernels.define import define_op


def rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """x [P, B, D] times gain [D] or [P, D] over its root mean square; statistics in float32, result in x's dtype."""
    wide = x.to(compute_dtype(x))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if gain.dim() == 2:
        gain = gain.unsqueeze(1)
    return (wide * scale * gain.to(wide.dtype)).to(x.dtype)


def mixed_linear_reference(
    x: torch.Tensor,
    w: torch.Tensor,
    gain: torch.Tensor | None = None,
    eps: float = 1e-6,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """residual + act(RMSNorm(x) @ w + bias), position by position.

    Args:
        x: Tokens [P, B, D], all rows of a position together.
        w: Weights [P, D, F]; P = 1 is the shared set of the S-tokens.
        gain: RMSNorm gain [D] or [P, D]; None leaves the norm out.
        eps: Added to the mean square.
        bias: [P, F] or None.
        residual: [P, B, F] or None.
        activation: A name in `ACTIVATIONS`, or None.

    Returns:
        [P, B, F] in x's dtype.

    Source: arXiv 2510.26104, section 3.3 (mixed parameterisation).
    """
    if gain is not None:
        x = rms_norm(x, gain, eps)
    y_PBF = torch.bmm(x, w)
    if bias is not None:
        y_PBF = y_PBF + bias.unsqueeze(1)
    if activation is not None:
        y_PBF = ACTIVATIONS[activation](y_PBF)
    return y_PBF if residual is None else residual + y_PBF


mixed_linear_op, mixed_linear = define_op(
    "mixed_linear",
    mixed_linear_reference,
    fake=lambda x, w, *_: x.new_empty((x.shape[0], x.shape[1], w.shape[2])),
    kernel="onetrans.kernels.mixed_linear.kernel:mixed_linear_triton",
)
