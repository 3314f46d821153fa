"""history_attention: causal attention of the S-tokens that a layer queries over the window it sees."""

from __future__ import annotations

import torch

from onetrans.kernels.autograd import compute_dtype, differentiate_by_reference


def history_attention_reference(
    q_UHNE: torch.Tensor,
    k_UHNE: torch.Tensor,
    v_UHNE: torch.Tensor,
    q_start_U: torch.Tensor,
    past_k_UHWE: torch.Tensor | None = None,
    past_v_UHWE: torch.Tensor | None = None,
    past_length_U: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the queried tail over the new tokens of the window and, in an append, over the state before them.

    The queries of user u are the tokens at q_start[u], q_start[u] + 1, … of the new tokens, which are left-aligned; the
    query at i sees new tokens 0 … q_start[u] + i (lower-right causal) and the first past_length[u] tokens of the past.
    1/sqrt(E) is folded into the queries. Rows past a user's valid length give finite values that nothing reads.

    Args:
        q_UHNE: Queries [U, H, Nq, E].
        k_UHNE: Keys of the new tokens [U, H, N, E].
        v_UHNE: Their values [U, H, N, E].
        q_start_U: Index of the first query among the new tokens [U], int64.
        past_k_UHWE: Cached keys [U, H, W, E], left-aligned; None in a fresh prefill. Padding may hold anything.
        past_v_UHWE: Cached values, likewise.
        past_length_U: Valid tokens of the past [U], int64, from 0.

    Returns:
        [U, H, Nq, E] in q's dtype.

    Source: arXiv 2510.26104, section 3.4 (pyramid).
    """
    wide = compute_dtype(q_UHNE)
    Nq, N = q_UHNE.shape[2], k_UHNE.shape[2]
    device = q_UHNE.device
    last_UN = q_start_U[:, None] + torch.arange(Nq, device=device)
    visible = torch.arange(N, device=device) <= last_UN[:, :, None]
    q = q_UHNE.to(wide)
    scores = torch.matmul(q, k_UHNE.to(wide).transpose(-1, -2))
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    v = v_UHNE.to(wide)
    if past_k_UHWE is not None:
        assert past_v_UHWE is not None
        assert past_length_U is not None
        W = past_k_UHWE.shape[2]
        valid_UW = torch.arange(W, device=device) < past_length_U[:, None]
        past = torch.matmul(q, past_k_UHWE.to(wide).transpose(-1, -2))
        past = past.masked_fill(~valid_UW[:, None, None], float("-inf"))
        scores = torch.cat([past, scores], dim=-1)
        v = torch.cat([past_v_UHWE.to(wide).masked_fill(~valid_UW[:, None, :, None], 0.0), v], dim=2)
    return torch.matmul(torch.softmax(scores, dim=-1), v).to(q_UHNE.dtype)


@torch.library.custom_op("onetrans::history_attention", mutates_args=())
def history_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_start: torch.Tensor,
    past_k: torch.Tensor | None = None,
    past_v: torch.Tensor | None = None,
    past_length: torch.Tensor | None = None,
) -> torch.Tensor:
    """The op; see `history_attention_reference`."""
    return history_attention_reference(q, k, v, q_start, past_k, past_v, past_length)


@history_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_start: torch.Tensor,
    past_k: torch.Tensor | None = None,
    past_v: torch.Tensor | None = None,
    past_length: torch.Tensor | None = None,
) -> torch.Tensor:
    return q.new_empty(q.shape)


differentiate_by_reference(history_attention, history_attention_reference)
