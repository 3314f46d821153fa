"""OneTrans: one causal Transformer over behaviour tokens and feature tokens (arXiv 2510.26104)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from onetrans.kernels import state_value
from onetrans.model.config import ModelConfig
from onetrans.model.stack import Stack, StackConfig
from onetrans.model.tokenizers import MLP, AutoSplitTokenizer, Embeddings, EventTokenizer, GroupWiseTokenizer

Past = Sequence[tuple[torch.Tensor, torch.Tensor]]


def stack_config(config: ModelConfig) -> StackConfig:
    """The stack's part of a model's configuration."""
    return StackConfig(
        d=config.d,
        heads=config.heads,
        l_ns=config.l_ns,
        user_tokens=config.user_tokens,
        ffn_ratio=config.ffn_ratio,
        activation=config.activation,
        gated=config.gated,
        bias=config.bias,
        norm_gain=config.norm_gain,
        output_projection=config.output_projection,
        eps=config.eps,
        pyramid=config.pyramid,
    )


class OneTrans(nn.Module):
    """The whole model; training, reference, prefill, append and decode share its one `forward`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.events = EventTokenizer(config, self.embeddings)
        ns = AutoSplitTokenizer if config.tokenizer == "auto_split" else GroupWiseTokenizer
        self.features = ns(config, self.embeddings)
        self.stack = Stack(stack_config(config))
        self.norm = nn.Parameter(torch.ones(config.d))
        wide = config.d * (config.l_ns if config.head_pooling == "concat" else 1)
        self.heads = nn.ModuleDict({task: MLP(wide, config.head_hidden, 1, config.activation) for task in config.tasks})

    def forward(
        self,
        user: Mapping[str, torch.Tensor],
        candidate: Mapping[str, torch.Tensor],
        past: Past | None = None,
    ) -> dict[str, torch.Tensor]:
        """Scores C candidates for each of U users.

        Args:
            user: The user-scope inputs of `onetrans.features.encode.input_specs`: events [U, N], user features [U].
            candidate: The candidate-scope inputs [U, C].
            past: Per layer K and V of the history before `history_start`, each [U, W, H, E]; None in a fresh prefill.

        Returns:
            Per task float32 logits [U, C] (float64 in the reference).
        """
        user_tokens, candidate_tokens = self.features(user, candidate)
        s_tokens = self.events(user)
        user_tokens, candidate_tokens = self.stack(
            s_tokens, user_tokens, candidate_tokens, user["history_start"], user["history_length"], past
        )
        U = user["history_length"].shape[0]
        pooled_UCF = self._pool(user_tokens, candidate_tokens, U)
        wide = torch.promote_types(pooled_UCF.dtype, torch.float32)
        return {task: head(pooled_UCF).squeeze(-1).to(wide) for task, head in self.heads.items()}

    def _pool(self, user_PUD: torch.Tensor | None, candidate_PBD: torch.Tensor, U: int) -> torch.Tensor:
        eps, pooling = self.config.eps, self.config.head_pooling
        candidate_PBD = F.rms_norm(candidate_PBD, self.norm.shape, self.norm, eps)
        P, B, D = candidate_PBD.shape
        C = B // U
        if pooling == "last":
            return candidate_PBD[-1].view(U, C, D)
        user_PUD = None if user_PUD is None else F.rms_norm(user_PUD, self.norm.shape, self.norm, eps)
        if pooling == "mean":
            total = candidate_PBD.sum(0).view(U, C, D)
            if user_PUD is not None:
                total = total + state_value(user_PUD.sum(0)[:, None], "user_pooled")
            return total / self.config.l_ns
        joined = candidate_PBD.transpose(0, 1).reshape(U, C, P * D)
        if user_PUD is None:
            return joined
        before = state_value(user_PUD.transpose(0, 1).reshape(U, 1, -1), "user_pooled")
        return torch.cat([before.expand(U, C, before.shape[2]), joined], dim=-1)
