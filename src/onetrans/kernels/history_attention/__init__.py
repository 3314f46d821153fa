"""history_attention: causal attention of a layer's queried S-tokens over the window it sees."""

from onetrans.kernels.history_attention.op import (
    history_attention,
    history_attention_op,
    history_attention_reference,
)

__all__ = ["history_attention", "history_attention_op", "history_attention_reference"]
