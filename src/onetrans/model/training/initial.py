"""Initial weights for training."""

from __future__ import annotations

import torch

from onetrans.model.checkpoint import random_model
from onetrans.model.config import ModelConfig
from onetrans.model.onetrans import OneTrans

RESIDUAL_SCALE = 0.1
RESIDUAL_WEIGHTS = ("wo_s", "wo_ns", "w2_s", "w2_ns")


def initial_model(config: ModelConfig, seed: int) -> OneTrans:
    """A model to train from scratch: distinct embeddings, and residual branches that start small.

    Embeddings are drawn from the standard normal, since small ones drown in the biases of the MLPs that read them; and
    the layers' output projections shrink to `RESIDUAL_SCALE`, since full ones drown the tokens in random mixtures.
    """
    model = random_model(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for table in model.embeddings.tables.parameters():
            table.normal_(generator=generator)
            table[0] = 0  # the unknown id
        for block in model.stack.blocks:
            for name, weight in block.named_parameters():
                if name in RESIDUAL_WEIGHTS:
                    weight.mul_(RESIDUAL_SCALE)
    return model
