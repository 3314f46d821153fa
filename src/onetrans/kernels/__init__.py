"""The semantic ops, a folder each: the public reference, whose signature is the schema, and the Triton kernel.

Dimensions in names: U users, C candidates of a user, P token positions with weights of their own, B rows (U·C or U·N),
N new tokens, W window, H heads, E head dimension, D model width, F feed-forward width.
"""

from onetrans.kernels.candidate_attention import candidate_attention, candidate_attention_reference
from onetrans.kernels.history_attention import history_attention, history_attention_reference
from onetrans.kernels.mixed_ffn import mixed_ffn, mixed_ffn_reference
from onetrans.kernels.mixed_linear import mixed_linear, mixed_linear_reference
from onetrans.kernels.state_value import state_value
from onetrans.kernels.take_rows import take_rows, take_rows_reference

__all__ = [
    "candidate_attention",
    "candidate_attention_reference",
    "history_attention",
    "history_attention_reference",
    "mixed_ffn",
    "mixed_ffn_reference",
    "mixed_linear",
    "mixed_linear_reference",
    "state_value",
    "take_rows",
    "take_rows_reference",
]
