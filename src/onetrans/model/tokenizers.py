"""Tokenizers: events to S-tokens, and the other features to NS-tokens (arXiv 2510.26104, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from onetrans.features.schema import Feature
from onetrans.kernels.activations import ACTIVATIONS
from onetrans.model.config import ModelConfig


class Embeddings(nn.Module):
    """The embedding tables, shared by every feature that names them; id 0 is unknown and embeds to zero."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tables = nn.ModuleDict(
            {
                name: nn.Embedding(vocab, dim, padding_idx=0, _weight=_table(vocab, dim))
                for name, (vocab, dim) in config.schema.tables().items()
            }
        )

    def forward(self, feature: Feature, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Embeds one feature: ids [...] or [..., width], or floats [...], to [..., embedded_dim]."""
        if feature.kind == "numeric":
            return value.unsqueeze(-1).to(dtype)
        embedded: torch.Tensor = self.tables[feature.table](value)
        if feature.kind == "categorical":
            return embedded
        given = (value > 0).to(embedded.dtype).unsqueeze(-1)
        return (embedded * given).sum(-2) / given.sum(-2).clamp(min=1)


def _table(vocab: int, dim: int) -> torch.Tensor:
    weight = torch.randn(vocab, dim) * 0.05
    weight[0] = 0
    return weight


class MLP(nn.Module):
    """Linear, activation, linear over the last axis."""

    def __init__(self, wide: int, hidden: int, out: int, activation: str) -> None:
        super().__init__()
        self.up = nn.Linear(wide, hidden)
        self.down = nn.Linear(hidden, out)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., wide] to [..., out]."""
        y: torch.Tensor = self.down(ACTIVATIONS[self.activation](self.up(x)))
        return y


class EventTokenizer(nn.Module):
    """Events to S-tokens: embedded features through the event MLP, the behaviour's type indicator, positions, [SEP]."""

    def __init__(self, config: ModelConfig, embeddings: Embeddings) -> None:
        super().__init__()
        self.config = config
        wide = sum(feature.embedded_dim for feature in config.schema.event)
        behaviours = len(config.schema.behaviours)
        count = behaviours if config.event_mlp == "per_behaviour" else 1
        self.mlps = nn.ModuleList(MLP(wide, config.event_hidden, config.d, config.activation) for _ in range(count))
        self.behaviour = nn.Parameter(torch.randn(behaviours, config.d) * 0.05)
        if config.merge == "intent":
            self.separator = nn.Parameter(torch.randn(behaviours, config.d) * 0.05)
        self._embeddings = [embeddings]  # in a list: the tables belong to the model, not to this module

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """S-tokens [U, N, D] of the `event_*` inputs; rows past `history_length` are finite and unread."""
        config = self.config
        behaviour_UN = inputs["event_behaviour"]
        dtype = self.behaviour.dtype
        embed = self._embeddings[0]
        features = [embed(f, inputs[f"event_{f.name}"], dtype) for f in config.schema.event]
        x_UNF = torch.cat(features, dim=-1)
        count = len(config.schema.behaviours)
        if len(self.mlps) == 1:
            tokens: torch.Tensor = self.mlps[0](x_UNF)
        else:
            is_kind = F.one_hot(behaviour_UN % count, count).to(dtype)
            tokens = torch.stack([mlp(x_UNF) * is_kind[..., i, None] for i, mlp in enumerate(self.mlps)]).sum(0)
        tokens = tokens + F.embedding(behaviour_UN % count, self.behaviour)
        if config.merge == "intent":
            separator = F.embedding(behaviour_UN % count, self.separator)
            tokens = torch.where((behaviour_UN >= count)[..., None], separator, tokens)
        if config.positions == "sinusoidal":
            tokens = tokens + self._positions(inputs["history_start"], tokens)
        return tokens

    def _positions(self, start_U: torch.Tensor, like_UND: torch.Tensor) -> torch.Tensor:
        d = self.config.d
        wide = torch.promote_types(like_UND.dtype, torch.float32)
        index = start_U[:, None] + torch.arange(like_UND.shape[1], device=like_UND.device)
        pair = torch.arange(d, device=like_UND.device) // 2
        rate = torch.exp(pair.to(wide) * (-2.0 / d * 9.210340371976184))  # ln 10000
        angle = index[..., None].to(wide) * rate
        even = torch.arange(d, device=like_UND.device) % 2 == 0
        return torch.where(even, angle.sin(), angle.cos()).to(like_UND.dtype)


class AutoSplitTokenizer(nn.Module):
    """One MLP over the concatenation of all NS features, split into NS-tokens, all of candidate scope."""

    def __init__(self, config: ModelConfig, embeddings: Embeddings) -> None:
        super().__init__()
        self.config = config
        self._embeddings = [embeddings]
        wide = sum(f.embedded_dim for f in (*config.schema.user, *config.schema.candidate))
        self.mlp = MLP(wide, config.tokenizer_hidden, config.l_ns * config.d, config.activation)

    def forward(
        self, user: Mapping[str, torch.Tensor], candidate: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """No user-scope tokens, and candidate-scope tokens [L_NS, U·C, D]."""
        dtype = self.mlp.up.weight.dtype
        schema, embed = self.config.schema, self._embeddings[0]
        user_UF = torch.cat([embed(f, user[f"user_{f.name}"], dtype) for f in schema.user], dim=-1)
        candidate_UCF = torch.cat([embed(f, candidate[f"candidate_{f.name}"], dtype) for f in schema.candidate], -1)
        U, C, _ = candidate_UCF.shape
        x = torch.cat([user_UF[:, None].expand(U, C, -1), candidate_UCF], dim=-1)
        tokens: torch.Tensor = self.mlp(x)
        tokens = tokens.view(U * C, self.config.l_ns, self.config.d).transpose(0, 1).contiguous()
        return None, tokens


class GroupWiseTokenizer(nn.Module):
    """One MLP and one NS-token per feature group; tokens of user-scope groups come first and belong to prefill."""

    def __init__(self, config: ModelConfig, embeddings: Embeddings) -> None:
        super().__init__()
        self.config = config
        self._embeddings = [embeddings]
        self.groups = config.groups()
        self.mlps = nn.ModuleList(
            MLP(sum(f.embedded_dim for f in members), config.tokenizer_hidden, config.d, config.activation)
            for _, _, members in self.groups
        )

    def forward(
        self, user: Mapping[str, torch.Tensor], candidate: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """User-scope tokens [P_user, U, D] and candidate-scope tokens [P_candidate, U·C, D]."""
        embed = self._embeddings[0]
        tokens: dict[str, list[torch.Tensor]] = {"user": [], "candidate": []}
        for (_, scope, members), mlp in zip(self.groups, self.mlps, strict=True):
            inputs = user if scope == "user" else candidate
            assert isinstance(mlp, MLP)
            dtype = mlp.up.weight.dtype
            x = torch.cat([embed(f, inputs[f"{scope}_{f.name}"], dtype) for f in members], dim=-1)
            tokens[scope].append(mlp(x).reshape(-1, self.config.d))
        return (torch.stack(tokens["user"]) if tokens["user"] else None), torch.stack(tokens["candidate"])
