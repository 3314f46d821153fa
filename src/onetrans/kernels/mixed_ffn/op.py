"""mixed_ffn: a whole feed-forward sub-layer whose weights depend on the token's position."""

from __future__ import annotations

import torch

from onetrans.kernels.activations import ACTIVATIONS
from onetrans.kernels.define import define_op
from onetrans.kernels.mixed_linear import rms_norm


def mixed_ffn_reference(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    activation: str,
    gated: bool,
    b1: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
) -> torch.Tensor:
    """x + act(RMSNorm(x) @ w1 + b1) @ w2 + b2, position by position.

    Args:
        x: Tokens [P, B, D].
        w1: Up-projection [P, D, F], or [P, D, 2F] (gate, then value) where `gated`.
        w2: Down-projection [P, F, D].
        gain: RMSNorm gain [D] or [P, D].
        eps: Added to the mean square.
        activation: A name in `ACTIVATIONS`.
        gated: Multiply the activated first half by the second half.
        b1: [P, F] ([P, 2F] where `gated`) or None.
        b2: [P, D] or None.

    Returns:
        [P, B, D] in x's dtype.

    Source: arXiv 2510.26104, section 3.3: W2_i act(W1_i x_i).
    """
    h_PBF = torch.bmm(rms_norm(x, gain, eps), w1)
    if b1 is not None:
        h_PBF = h_PBF + b1.unsqueeze(1)
    if gated:
        gate, value = h_PBF.chunk(2, dim=-1)
        h_PBF = ACTIVATIONS[activation](gate) * value
    else:
        h_PBF = ACTIVATIONS[activation](h_PBF)
    y_PBD = torch.bmm(h_PBF, w2)
    if b2 is not None:
        y_PBD = y_PBD + b2.unsqueeze(1)
    return x + y_PBD


mixed_ffn_op, mixed_ffn = define_op(
    "mixed_ffn",
    mixed_ffn_reference,
    fake=lambda x, *_: torch.empty_like(x),
    kernel="onetrans.kernels.mixed_ffn.kernel:mixed_ffn_triton",
)
