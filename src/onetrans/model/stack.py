"""The stack: pre-norm blocks with mixed parameters over the pyramid's anchored windows.

S-tokens share one set of weights per layer; each NS position has its own. Dimensions as in `onetrans.kernels`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from onetrans.features.windows import Pyramid
from onetrans.kernels import candidate_attention, history_attention, mixed_ffn, mixed_linear, state_value, take_rows


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """What the stack needs to know; fields as in `ModelConfig`."""

    d: int
    heads: int
    l_ns: int
    user_tokens: int
    ffn_ratio: int
    activation: str
    gated: bool
    bias: bool
    norm_gain: str
    output_projection: str
    eps: float
    pyramid: Pyramid


@dataclass(frozen=True)
class Segment:
    """Part of a user's keys and values in one layer: k, v [U, W, H, E] and valid tokens [U]."""

    k: torch.Tensor
    v: torch.Tensor
    length: torch.Tensor


@dataclass(frozen=True)
class Windows:
    """Where every layer's window lies in the new tokens; all layers at once, since each operation is a launch.

    Attributes:
        q_start: First new token that queries, counted from the first that enters the layer [U, layers].
        new_length: New tokens that enter the layer [U, layers].
        past_length: Tokens of the past that the layer still sees [U, layers].
        capacity: Most new tokens that can query in each layer; None where no token is dropped.
    """

    q_start: torch.Tensor
    new_length: torch.Tensor
    past_length: torch.Tensor
    capacity: tuple[int | None, ...]


def layer_windows(config: StackConfig, start_U: torch.Tensor, length_U: torch.Tensor) -> Windows:
    """Windows of every layer for new tokens start … start + length - 1 of the history (the rule: features.windows)."""
    chunk = config.pyramid.chunk
    keeps = (config.pyramid.max_history, *config.pyramid.keep)
    start_U1, total_U1 = start_U[:, None], (start_U + length_U)[:, None]
    anchor_U1 = total_U1 - total_U1 % chunk
    begins = (anchor_U1 - torch.tensor(keeps, device=start_U.device)).clamp(min=0)  # [U, layers + 1]
    firsts = torch.maximum(start_U1, begins)
    enters = firsts[:, :-1]
    return Windows(
        q_start=firsts[:, 1:] - enters,
        new_length=total_U1 - enters,
        past_length=(start_U1 - begins[:, :-1]).clamp(min=0),
        capacity=tuple(None if after == before else after + chunk - 1 for before, after in itertools.pairwise(keeps)),
    )


class Block(nn.Module):
    """One layer: mixed causal attention over its window, then mixed feed-forward, each with a residual."""

    def __init__(self, config: StackConfig, index: int) -> None:
        super().__init__()
        self.config = config
        self.index = index
        d, P = config.d, config.l_ns
        up = config.ffn_ratio * d * (2 if config.gated else 1)
        down = config.ffn_ratio * d

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape) * shape[-2] ** -0.5)

        self.wq_s = weight(1, d, d)
        self.wkv_s = weight(1, d, 2 * d)
        self.w1_s = weight(1, d, up)
        self.w2_s = weight(1, down, d)
        self.wqkv_ns = weight(P, d, 3 * d)
        self.w1_ns = weight(P, d, up)
        self.w2_ns = weight(P, down, d)
        if config.output_projection != "none":
            self.wo_s = weight(1, d, d)
        if config.output_projection == "mixed":
            self.wo_ns = weight(P, d, d)
        if config.bias:
            widths = {"bq_s": d, "bkv_s": 2 * d, "b1_s": up, "b2_s": d}
            for name, width in widths.items():
                self.register_parameter(name, nn.Parameter(torch.zeros(1, width)))
            for name, width in {"bqkv_ns": 3 * d, "b1_ns": up, "b2_ns": d}.items():
                self.register_parameter(name, nn.Parameter(torch.zeros(P, width)))
        self.norm1 = nn.Parameter(torch.ones(d))
        self.norm2 = nn.Parameter(torch.ones(d))
        if config.norm_gain == "per_token":
            self.norm1_ns = nn.Parameter(torch.ones(P, d))
            self.norm2_ns = nn.Parameter(torch.ones(P, d))
        scale = torch.ones(3 * d, dtype=torch.float64)
        scale[:d] = (d // config.heads) ** -0.5
        self.register_buffer("qkv_scale", scale, persistent=False)
        self.qkv_scale: torch.Tensor

    def _bias(self, name: str) -> torch.Tensor | None:
        return self.get_parameter(name) if self.config.bias else None

    def _heads(self, x_UND: torch.Tensor) -> torch.Tensor:
        U, N, _ = x_UND.shape
        H = self.config.heads
        x_UNHE: torch.Tensor = x_UND.view(U, N, H, self.config.d // H)
        return x_UNHE

    def history_keys(self, x_UND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of every S-token in the window, each [U, N, H, E]; the layer's cacheable state."""
        U, N, D = x_UND.shape
        kv = mixed_linear(
            x_UND.reshape(1, U * N, D), self.wkv_s, self.norm1, self.config.eps, self._bias("bkv_s"), None
        )
        H = self.config.heads
        k, v = (part.contiguous() for part in kv.view(U, N, 2 * H, D // H).chunk(2, dim=2))
        window = {"layer": self.index, "capacity": self.config.pyramid.capacities[self.index]}
        return (
            state_value(k, f"k{self.index}", role="key", **window),
            state_value(v, f"v{self.index}", role="value", **window),
        )

    def history(
        self, x_UND: torch.Tensor, k: torch.Tensor, v: torch.Tensor, windows: Windows, past: Segment | None
    ) -> torch.Tensor:
        """The S-tokens that the layer queries, [U, Nq, D]."""
        c = self.config
        capacity, q_start = windows.capacity[self.index], windows.q_start[:, self.index]
        if capacity is not None:
            rows = torch.sym_min(x_UND.shape[1], capacity)
            x_UND = take_rows(x_UND, q_start, rows)
        U, N, D = x_UND.shape
        x = x_UND.reshape(1, U * N, D)
        scale = self.qkv_scale[0].to(self.wq_s.dtype)
        bias = self._bias("bq_s")
        q = mixed_linear(x, self.wq_s * scale, self.norm1, c.eps, None if bias is None else bias * scale, None)
        past_args = (None, None, None) if past is None else (past.k, past.v, past.length)
        new_length = windows.new_length[:, self.index]
        out = history_attention(self._heads(q.view(U, N, D)), k, v, q_start, new_length, *past_args)
        out = out.reshape(1, U * N, D)
        x = x + out if c.output_projection == "none" else mixed_linear(out, self.wo_s, None, c.eps, None, x)
        x = mixed_ffn(
            x, self.w1_s, self.w2_s, self.norm2, c.eps, c.activation, c.gated, self._bias("b1_s"), self._bias("b2_s")
        )
        y_UND: torch.Tensor = x.view(U, N, D)
        return y_UND

    def non_sequence(
        self, x_PBD: torch.Tensor, first: int, segments: Sequence[Segment]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """NS-tokens first … first + P - 1 [P, B, D] over the user's segments; returns them with their K and V."""
        c = self.config
        P, B, D = x_PBD.shape
        at = slice(first, first + P)

        def part(name: str) -> torch.Tensor | None:
            return self.get_parameter(name)[at] if c.bias else None

        gain1: torch.Tensor = self.norm1
        gain2: torch.Tensor = self.norm2
        if c.norm_gain == "per_token":
            gain1, gain2 = self.norm1_ns[at], self.norm2_ns[at]
        scale = self.qkv_scale.to(x_PBD.dtype)
        bias = part("bqkv_ns")
        weight = self.wqkv_ns[at] * scale.to(self.wqkv_ns.dtype)
        qkv = mixed_linear(x_PBD, weight, gain1, c.eps, None if bias is None else bias * scale, None)
        q, k, v = qkv.chunk(3, dim=-1)
        out = candidate_attention(
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            [segment.k for segment in segments],
            [segment.v for segment in segments],
            [segment.length for segment in segments],
        )
        if c.output_projection == "mixed":
            x_PBD = mixed_linear(out, self.wo_ns[at], None, c.eps, None, x_PBD)
        elif c.output_projection == "shared":
            rows = mixed_linear(out.view(1, P * B, D), self.wo_s, None, c.eps, None, x_PBD.reshape(1, P * B, D))
            x_PBD = rows.view(P, B, D)
        else:
            x_PBD = x_PBD + out
        x_PBD = mixed_ffn(
            x_PBD, self.w1_ns[at], self.w2_ns[at], gain2, c.eps, c.activation, c.gated, part("b1_ns"), part("b2_ns")
        )
        return x_PBD, k, v


class Stack(nn.Module):
    """All layers between the tokenizers and the final norm."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.pyramid.layers))
        self.recompute = False

    def forward(
        self,
        s_UND: torch.Tensor,
        user_PUD: torch.Tensor | None,
        candidate_PBD: torch.Tensor,
        start_U: torch.Tensor,
        length_U: torch.Tensor,
        past: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Runs the stack.

        Args:
            s_UND: New S-tokens [U, N, D], left-aligned.
            user_PUD: User-scope NS-tokens [P_user, U, D], or None where there are none.
            candidate_PBD: Candidate-scope NS-tokens [P_candidate, U·C, D], a user's candidates together.
            start_U: Index of the first new S-token from the start of the history [U]; s_0 in a fresh prefill.
            length_U: Valid new S-tokens [U], from 0.
            past: K and V of each layer's earlier tokens, each [U, W_l, H, E] from s_{l-1} on; None in a fresh prefill.

        Returns:
            The user-scope and the candidate-scope NS-tokens after the last layer, shapes as they came.
        """
        windows = layer_windows(self.config, start_U, length_U)
        past_UN = state_value(windows.past_length, "past_lengths", role="past_lengths")
        lengths_UN = past_UN + windows.new_length
        lengths_UN = state_value(lengths_UN, "lengths", role="lengths")
        first = 0 if user_PUD is None else user_PUD.shape[0]
        user_length_U = state_value(torch.full_like(start_U, first), "user_length")
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            before = None if past is None else Segment(*past[index], past_UN[:, index])
            args = (block, s_UND, user_PUD, candidate_PBD, windows, lengths_UN[:, index], user_length_U, before)
            if self.recompute and self.training:
                s_UND, user_PUD, candidate_PBD = checkpoint(self._layer, *args, use_reentrant=False)
            else:
                s_UND, user_PUD, candidate_PBD = self._layer(*args)
        return user_PUD, candidate_PBD

    @staticmethod
    def _layer(
        block: Block,
        s_UND: torch.Tensor,
        user_PUD: torch.Tensor | None,
        candidate_PBD: torch.Tensor,
        windows: Windows,
        window_length_U: torch.Tensor,
        user_length_U: torch.Tensor,
        past: Segment | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        k, v = block.history_keys(s_UND)
        if past is None:
            segments = [Segment(k, v, window_length_U)]
        else:
            segments = [past, Segment(k, v, window_length_U - past.length)]
        s_UND = block.history(s_UND, k, v, windows, past)
        first = 0
        if user_PUD is not None:
            first = user_PUD.shape[0]
            user_PUD, user_k, user_v = block.non_sequence(user_PUD, 0, segments)
            shape = (block.config.heads, block.config.d // block.config.heads)
            user_k = state_value(user_k.unflatten(2, shape).transpose(0, 1).contiguous(), f"user_k{block.index}")
            user_v = state_value(user_v.unflatten(2, shape).transpose(0, 1).contiguous(), f"user_v{block.index}")
            segments = [Segment(user_k, user_v, user_length_U), *segments]
        candidate_PBD, _, _ = block.non_sequence(candidate_PBD, first, segments)
        return s_UND, user_PUD, candidate_PBD
