"""mixed_ffn: a feed-forward sub-layer with weights per position."""

from onetrans.kernels.mixed_ffn.op import (
    mixed_ffn,
    mixed_ffn_op,
    mixed_ffn_reference,
)

__all__ = ["mixed_ffn", "mixed_ffn_op", "mixed_ffn_reference"]
