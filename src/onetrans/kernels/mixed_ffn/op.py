"""mixed_ffn: a whole feed-forward sub-layer whose weights depend on the token's position."""

from __future__ import annotations

import torch

from onetrans.kernels.activations import ACTIVATIONS
from onetrans.kernels.autograd import differentiate_by_reference
from onetrans.kernels.dispatch import HALF, autocast_to_bfloat16, through_op
from onetrans.kernels.mixed_linear import rms_norm


def mixed_ffn_reference(
    x_PBD: torch.Tensor,
    w1_PDF: torch.Tensor,
    w2_PFD: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    activation: str,
    gated: bool,
    b1_PF: torch.Tensor | None = None,
    b2_PD: torch.Tensor | None = None,
) -> torch.Tensor:
    """x + act(RMSNorm(x) @ w1 + b1) @ w2 + b2, position by position.

    Args:
        x_PBD: Tokens [P, B, D].
        w1_PDF: Up-projection [P, D, F], or [P, D, 2F] (gate, then value) where `gated`.
        w2_PFD: Down-projection [P, F, D].
        gain: RMSNorm gain [D] or [P, D].
        eps: Added to the mean square.
        activation: A name in `ACTIVATIONS`.
        gated: Multiply the activated first half by the second half.
        b1_PF: [P, F] ([P, 2F] where `gated`) or None.
        b2_PD: [P, D] or None.

    Returns:
        [P, B, D] in x's dtype.

    Source: arXiv 2510.26104, section 3.3: W2_i act(W1_i x_i).
    """
    h_PBF = torch.bmm(rms_norm(x_PBD, gain, eps), w1_PDF)
    if b1_PF is not None:
        h_PBF = h_PBF + b1_PF.unsqueeze(1)
    if gated:
        gate, value = h_PBF.chunk(2, dim=-1)
        h_PBF = ACTIVATIONS[activation](gate) * value
    else:
        h_PBF = ACTIVATIONS[activation](h_PBF)
    y_PBD = torch.bmm(h_PBF, w2_PFD)
    if b2_PD is not None:
        y_PBD = y_PBD + b2_PD.unsqueeze(1)
    return x_PBD + y_PBD


@torch.library.custom_op("onetrans::mixed_ffn", mutates_args=())
def mixed_ffn_op(
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
    """The `torch.library` op; see `mixed_ffn_reference`."""
    return mixed_ffn_reference(x, w1, w2, gain, eps, activation, gated, b1, b2)


@mixed_ffn_op.register_kernel("cuda")
def _(
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
    """The Triton kernels in float16 and bfloat16; full precision, of gold and training, is the reference's."""
    if x.dtype not in HALF:
        return mixed_ffn_reference(x, w1, w2, gain, eps, activation, gated, b1, b2)
    from onetrans.kernels.mixed_ffn.kernel import mixed_ffn_triton

    with torch.cuda.device(x.device):
        out: torch.Tensor = mixed_ffn_triton(x, w1, w2, gain, eps, activation, gated, b1, b2)
    return out


@mixed_ffn_op.register_fake
def _(
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
    return torch.empty_like(x)


differentiate_by_reference(mixed_ffn_op, mixed_ffn_reference)
autocast_to_bfloat16(mixed_ffn_op)


def mixed_ffn(
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
    """See `mixed_ffn_reference`; goes through the op where that is more than the reference (`through_op`)."""
    run = mixed_ffn_op if through_op(x) else mixed_ffn_reference
    return run(x, w1, w2, gain, eps, activation, gated, b1, b2)
