"""history_attention: causal attention of the S-tokens that a layer queries over the window it sees."""

from __future__ import annotations

import torch

from onetrans.kernels.autograd import compute_dtype
from onetrans.kernels.define import define_op


def history_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_start: torch.Tensor,
    length: torch.Tensor,
    past_k: torch.Tensor | None = None,
    past_v: torch.Tensor | None = None,
    past_length: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the queried tail over the new tokens of the window and, in an append, over the state before them.

    The queries of user u are the tokens at q_start[u], q_start[u] + 1, … of the new tokens, which are left-aligned; the
    query at i sees new tokens 0 … q_start[u] + i (lower-right causal) and the first past_length[u] tokens of the past.
    1/sqrt(E) is folded into the queries. Rows past a user's valid length give finite values that nothing reads.

    Args:
        q: Queries [U, Nq, H, E].
        k: Keys of the new tokens [U, N, H, E].
        v: Their values [U, N, H, E].
        q_start: Index of the first query among the new tokens [U], int64.
        length: Valid new tokens [U], int64, from 0; nothing reads the queries beyond them.
        past_k: Cached keys [U, W, H, E], left-aligned; None in a fresh prefill. Padding may hold anything.
        past_v: Cached values, likewise.
        past_length: Valid tokens of the past [U], int64, from 0.
        slots: Where the past (without one, k and v) is a pool of states [slots, …], the slot of each user [U], int64.

    Returns:
        [U, Nq, H, E] in q's dtype.

    Source: arXiv 2510.26104, section 3.4 (pyramid).
    """
    if slots is not None and past_k is not None and past_v is not None:
        past_k, past_v = past_k[slots], past_v[slots]
    elif slots is not None:
        valid_UN = (torch.arange(k.shape[1], device=k.device) < length[:, None])[:, :, None, None]
        k, v = (x[slots].masked_fill(~valid_UN, 0.0) for x in (k, v))
    wide = compute_dtype(q)
    Nq, N = q.shape[1], k.shape[1]
    device = q.device
    last_UN = q_start[:, None] + torch.arange(Nq, device=device)
    visible = torch.arange(N, device=device) <= last_UN[:, :, None]
    q_UHNE = q.to(wide).transpose(1, 2)
    scores = torch.matmul(q_UHNE, k.to(wide).permute(0, 2, 3, 1))
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    v_UHNE = v.to(wide).transpose(1, 2)
    if past_k is not None:
        assert past_v is not None
        assert past_length is not None
        W = past_k.shape[1]
        valid_UW = torch.arange(W, device=device) < past_length[:, None]
        past = torch.matmul(q_UHNE, past_k.to(wide).permute(0, 2, 3, 1))
        past = past.masked_fill(~valid_UW[:, None, None], float("-inf"))
        scores = torch.cat([past, scores], dim=-1)
        past_v = past_v.to(wide).masked_fill(~valid_UW[:, :, None, None], 0.0)
        v_UHNE = torch.cat([past_v.transpose(1, 2), v_UHNE], dim=2)
    out_UHNE = torch.matmul(torch.softmax(scores, dim=-1), v_UHNE)
    return out_UHNE.transpose(1, 2).to(q.dtype).contiguous()


history_attention_op, history_attention = define_op(
    "history_attention",
    history_attention_reference,
    fake=lambda q, *_: q.new_empty(q.shape),
    kernel="onetrans.kernels.history_attention.kernel:history_attention_triton",
)
