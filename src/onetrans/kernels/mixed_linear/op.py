"""mixed_linear: a projection with weights by the token's position, RMSNorm before, activation and residual after."""

from __future__ import annotations

import torch

from onetrans.kernels.activations import ACTIVATIONS
from onetrans.kernels.autograd import compute_dtype, differentiate_by_reference
from onetrans.kernels.dispatch import HALF, autocast_to_bfloat16, through_op


def rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """x [P, B, D] times gain [D] or [P, D] over its root mean square; statistics in float32, result in x's dtype."""
    wide = x.to(compute_dtype(x))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if gain.dim() == 2:
        gain = gain.unsqueeze(1)
    return (wide * scale * gain.to(wide.dtype)).to(x.dtype)


def mixed_linear_reference(
    x_PBD: torch.Tensor,
    w_PDF: torch.Tensor,
    gain: torch.Tensor | None = None,
    eps: float = 1e-6,
    bias_PF: torch.Tensor | None = None,
    residual_PBF: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """residual + act(RMSNorm(x) @ w + bias), position by position.

    Args:
        x_PBD: Tokens [P, B, D], all rows of a position together.
        w_PDF: Weights [P, D, F]; P = 1 is the shared set of the S-tokens.
        gain: RMSNorm gain [D] or [P, D]; None leaves the norm out.
        eps: Added to the mean square.
        bias_PF: [P, F] or None.
        residual_PBF: [P, B, F] or None.
        activation: A name in `ACTIVATIONS`, or None.

    Returns:
        [P, B, F] in x's dtype.

    Source: arXiv 2510.26104, section 3.3 (mixed parameterisation).
    """
    if gain is not None:
        x_PBD = rms_norm(x_PBD, gain, eps)
    y_PBF = torch.bmm(x_PBD, w_PDF)
    if bias_PF is not None:
        y_PBF = y_PBF + bias_PF.unsqueeze(1)
    if activation is not None:
        y_PBF = ACTIVATIONS[activation](y_PBF)
    return y_PBF if residual_PBF is None else residual_PBF + y_PBF


@torch.library.custom_op("onetrans::mixed_linear", mutates_args=())
def mixed_linear_op(
    x: torch.Tensor,
    w: torch.Tensor,
    gain: torch.Tensor | None = None,
    eps: float = 1e-6,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """The `torch.library` op; see `mixed_linear_reference`."""
    return mixed_linear_reference(x, w, gain, eps, bias, residual, activation)


@mixed_linear_op.register_kernel("cuda")
def _(
    x: torch.Tensor,
    w: torch.Tensor,
    gain: torch.Tensor | None = None,
    eps: float = 1e-6,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """The Triton kernel in float16 and bfloat16; full precision, of gold and training, is the reference's."""
    if x.dtype not in HALF:
        return mixed_linear_reference(x, w, gain, eps, bias, residual, activation)
    from onetrans.kernels.mixed_linear.kernel import mixed_linear_triton

    with torch.cuda.device(x.device):
        out: torch.Tensor = mixed_linear_triton(x, w, gain, eps, bias, residual, activation)
    return out


@mixed_linear_op.register_fake
def _(
    x: torch.Tensor,
    w: torch.Tensor,
    gain: torch.Tensor | None = None,
    eps: float = 1e-6,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], x.shape[1], w.shape[2]))


differentiate_by_reference(mixed_linear_op, mixed_linear_reference)
autocast_to_bfloat16(mixed_linear_op)


def mixed_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    gain: torch.Tensor | None = None,
    eps: float = 1e-6,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """See `mixed_linear_reference`; goes through the op where that is more than the reference (`through_op`)."""
    run = mixed_linear_op if through_op(x) else mixed_linear_reference
    return run(x, w, gain, eps, bias, residual, activation)
