"""mixed_linear: a projection with weights per position, RMSNorm before and residual after."""

from onetrans.kernels.mixed_linear.into_state import keys_into_state, keys_into_state_op, keys_into_state_reference
from onetrans.kernels.mixed_linear.op import (
    mixed_linear,
    mixed_linear_op,
    mixed_linear_reference,
    rms_norm,
)

__all__ = [
    "keys_into_state",
    "keys_into_state_op",
    "keys_into_state_reference",
    "mixed_linear",
    "mixed_linear_op",
    "mixed_linear_reference",
    "rms_norm",
]
