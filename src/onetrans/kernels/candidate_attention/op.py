"""candidate_attention: the NS-tokens of all candidates over their user's K/V and each candidate's own NS block."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from onetrans.kernels.autograd import compute_dtype
from onetrans.kernels.define import define_op


def candidate_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    lengths: Sequence[torch.Tensor],
    slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """One softmax over the user's segments and the candidate's own causal block; the segments are read once per user.

    Query p of a candidate sees the valid tokens of every segment and positions 0 … p of its own block. 1/sqrt(E) is
    folded into the queries.

    Args:
        q: Queries of the NS-tokens [P, U·C, H·E], candidates of a user together, heads as contiguous slices.
        k: Keys of the candidates' own NS-tokens, likewise.
        v: Their values, likewise.
        keys: The user's key segments, each [U, W_i, H, E], left-aligned; padding may hold anything.
        values: The user's value segments, likewise.
        lengths: Valid tokens of each segment, each [U] int64, from 0.
        slots: Where the last segment is a pool of states [slots, W, H, E], the slot of each user [U], int64.

    Returns:
        [P, U·C, H·E] in q's dtype.

    Source: arXiv 2510.26104, sections 3.3 and 3.5 (stage II of the KV cache).
    """
    wide = compute_dtype(q)
    P, B, D = q.shape
    U, (H, E) = lengths[0].shape[0], keys[0].shape[2:]
    C = B // U
    if slots is not None:
        keys, values = [*keys[:-1], keys[-1][slots]], [*values[:-1], values[-1][slots]]

    def heads(x_PBD: torch.Tensor) -> torch.Tensor:
        return x_PBD.to(wide).view(P, U, C, H, E).permute(1, 3, 2, 0, 4)

    q_UHCPE, k_UHCPE, v_UHCPE = heads(q), heads(k), heads(v)
    rows = q_UHCPE.reshape(U, H, C * P, E)
    scores, clean = [], []
    for key, value, length in zip(keys, values, lengths, strict=True):
        W = key.shape[1]
        valid_UW = torch.arange(W, device=key.device) < length[:, None]
        segment = torch.matmul(rows, key.to(wide).permute(0, 2, 3, 1)).view(U, H, C, P, W)
        scores.append(segment.masked_fill(~valid_UW[:, None, None, None], float("-inf")))
        clean.append(value.to(wide).masked_fill(~valid_UW[:, :, None, None], 0.0).transpose(1, 2))
    own = torch.matmul(q_UHCPE, k_UHCPE.transpose(-1, -2))
    causal = torch.ones(P, P, dtype=torch.bool, device=own.device).tril()
    scores.append(own.masked_fill(~causal, float("-inf")))
    weights = torch.softmax(torch.cat(scores, dim=-1), dim=-1)
    parts = weights.split([part.shape[-1] for part in scores], dim=-1)
    out = torch.matmul(parts[-1], v_UHCPE)
    for part, value in zip(parts[:-1], clean, strict=True):
        W = value.shape[2]
        out = out + torch.matmul(part.reshape(U, H, C * P, W), value).view(U, H, C, P, E)
    return out.permute(3, 0, 2, 1, 4).reshape(P, B, D).to(q.dtype)


candidate_attention_op, candidate_attention = define_op(
    "candidate_attention",
    candidate_attention_reference,
    fake=lambda q, *_: q.new_empty(q.shape),
    kernel="onetrans.kernels.candidate_attention.kernel:candidate_attention_triton",
)
