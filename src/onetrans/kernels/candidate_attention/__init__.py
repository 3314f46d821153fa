"""candidate_attention: all candidates' NS-tokens over their user's K/V and their own blocks."""

from onetrans.kernels.candidate_attention.op import (
    candidate_attention,
    candidate_attention_op,
    candidate_attention_reference,
)

__all__ = ["candidate_attention", "candidate_attention_op", "candidate_attention_reference"]
