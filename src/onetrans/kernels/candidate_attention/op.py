"""candidate_attention: the NS-tokens of all candidates over their user's K/V and each candidate's own NS block."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from onetrans.kernels.autograd import compute_dtype, differentiate_by_reference
from onetrans.kernels.dispatch import HALF, autocast_to_bfloat16, through_op


def candidate_attention_reference(
    q_PBD: torch.Tensor,
    k_PBD: torch.Tensor,
    v_PBD: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    lengths: Sequence[torch.Tensor],
    slots_U: torch.Tensor | None = None,
) -> torch.Tensor:
    """One softmax over the user's segments and the candidate's own causal block; the segments are read once per user.

    Query p of a candidate sees the valid tokens of every segment and positions 0 … p of its own block. 1/sqrt(E) is
    folded into the queries.

    Args:
        q_PBD: Queries of the NS-tokens [P, U·C, H·E], candidates of a user together, heads as contiguous slices.
        k_PBD: Keys of the candidates' own NS-tokens, likewise.
        v_PBD: Their values, likewise.
        keys: The user's key segments, each [U, W_i, H, E], left-aligned; padding may hold anything.
        values: The user's value segments, likewise.
        lengths: Valid tokens of each segment, each [U] int64, from 0.
        slots_U: Where the last segment is a pool of states [slots, W, H, E], the slot of each user [U], int64.

    Returns:
        [P, U·C, H·E] in q's dtype.

    Source: arXiv 2510.26104, sections 3.3 and 3.5 (stage II of the KV cache).
    """
    wide = compute_dtype(q_PBD)
    P, B, D = q_PBD.shape
    U, (H, E) = lengths[0].shape[0], keys[0].shape[2:]
    C = B // U
    if slots_U is not None:
        keys, values = [*keys[:-1], keys[-1][slots_U]], [*values[:-1], values[-1][slots_U]]

    def heads(x_PBD: torch.Tensor) -> torch.Tensor:
        return x_PBD.to(wide).view(P, U, C, H, E).permute(1, 3, 2, 0, 4)

    q_UHCPE, k_UHCPE, v_UHCPE = heads(q_PBD), heads(k_PBD), heads(v_PBD)
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
    return out.permute(3, 0, 2, 1, 4).reshape(P, B, D).to(q_PBD.dtype)


@torch.library.custom_op("onetrans::candidate_attention", mutates_args=())
def candidate_attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    lengths: Sequence[torch.Tensor],
    slots: torch.Tensor | None,
) -> torch.Tensor:
    """The `torch.library` op; see `candidate_attention_reference`."""
    return candidate_attention_reference(q, k, v, keys, values, lengths, slots)


@candidate_attention_op.register_kernel("cuda")
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    lengths: Sequence[torch.Tensor],
    slots: torch.Tensor | None,
) -> torch.Tensor:
    """The Triton kernel in float16 and bfloat16; full precision, as of the gold and in training, is the reference's."""
    if q.dtype not in HALF:
        return candidate_attention_reference(q, k, v, keys, values, lengths, slots)
    from onetrans.kernels.candidate_attention.kernel import candidate_attention_triton

    with torch.cuda.device(q.device):
        out: torch.Tensor = candidate_attention_triton(q, k, v, keys, values, lengths, slots)
        return out


@candidate_attention_op.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    lengths: Sequence[torch.Tensor],
    slots: torch.Tensor | None,
) -> torch.Tensor:
    return q.new_empty(q.shape)


differentiate_by_reference(candidate_attention_op, candidate_attention_reference)
autocast_to_bfloat16(candidate_attention_op)


def candidate_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    lengths: Sequence[torch.Tensor],
    slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `candidate_attention_reference`; goes through the op where that is more than the reference (`through_op`)."""
    run = candidate_attention_op if through_op(q) else candidate_attention_reference
    return run(q, k, v, keys, values, lengths, slots)
