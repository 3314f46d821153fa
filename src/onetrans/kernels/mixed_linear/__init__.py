"""mixed_linear: a projection with weights per position, RMSNorm before and residual after."""

from onetrans.kernels.mixed_linear.op import (
    mixed_linear,
    mixed_linear_op,
    mixed_linear_reference,
    rms_norm,
)

__all__ = ["mixed_linear", "mixed_linear_op", "mixed_linear_reference", "rms_norm"]
