"""history_attention: causal attention of the S-tokens that a layer queries over the window it sees."""

from __future__ import annotations

import torch

from onetrans.kernels.autograd import compute_dtype, differentiate_by_reference
from onetrans.kernels.dispatch import HALF, autocast_to_bfloat16, through_op


def history_attention_reference(
    q_UNHE: torch.Tensor,
    k_UNHE: torch.Tensor,
    v_UNHE: torch.Tensor,
    q_start_U: torch.Tensor,
    length_U: torch.Tensor,
    past_k_UWHE: torch.Tensor | None = None,
    past_v_UWHE: torch.Tensor | None = None,
    past_length_U: torch.Tensor | None = None,
    slots_U: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the queried tail over the new tokens of the window and, in an append, over the state before them.

    The queries of user u are the tokens at q_start[u], q_start[u] + 1, … of the new tokens, which are left-aligned; the
    query at i sees new tokens 0 … q_start[u] + i (lower-right causal) and the first past_length[u] tokens of the past.
    1/sqrt(E) is folded into the queries. Rows past a user's valid length give finite values that nothing reads.

    Args:
        q_UNHE: Queries [U, Nq, H, E].
        k_UNHE: Keys of the new tokens [U, N, H, E].
        v_UNHE: Their values [U, N, H, E].
        q_start_U: Index of the first query among the new tokens [U], int64.
        length_U: Valid new tokens [U], int64, from 0; what is queried beyond them is nobody's.
        past_k_UWHE: Cached keys [U, W, H, E], left-aligned; None in a fresh prefill. Padding may hold anything.
        past_v_UWHE: Cached values, likewise.
        past_length_U: Valid tokens of the past [U], int64, from 0.
        slots_U: Where the past (without one, k and v) is a pool of states [slots, …], the slot of each user [U], int64.

    Returns:
        [U, Nq, H, E] in q's dtype.

    Source: arXiv 2510.26104, section 3.4 (pyramid).
    """
    if slots_U is not None and past_k_UWHE is not None and past_v_UWHE is not None:
        past_k_UWHE, past_v_UWHE = past_k_UWHE[slots_U], past_v_UWHE[slots_U]
    elif slots_U is not None:
        valid_UN = (torch.arange(k_UNHE.shape[1], device=k_UNHE.device) < length_U[:, None])[:, :, None, None]
        k_UNHE, v_UNHE = (x[slots_U].masked_fill(~valid_UN, 0.0) for x in (k_UNHE, v_UNHE))
    wide = compute_dtype(q_UNHE)
    Nq, N = q_UNHE.shape[1], k_UNHE.shape[1]
    device = q_UNHE.device
    last_UN = q_start_U[:, None] + torch.arange(Nq, device=device)
    visible = torch.arange(N, device=device) <= last_UN[:, :, None]
    q_UHNE = q_UNHE.to(wide).transpose(1, 2)
    scores = torch.matmul(q_UHNE, k_UNHE.to(wide).permute(0, 2, 3, 1))
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    v_UHNE = v_UNHE.to(wide).transpose(1, 2)
    if past_k_UWHE is not None:
        assert past_v_UWHE is not None
        assert past_length_U is not None
        W = past_k_UWHE.shape[1]
        valid_UW = torch.arange(W, device=device) < past_length_U[:, None]
        past = torch.matmul(q_UHNE, past_k_UWHE.to(wide).permute(0, 2, 3, 1))
        past = past.masked_fill(~valid_UW[:, None, None], float("-inf"))
        scores = torch.cat([past, scores], dim=-1)
        past_v = past_v_UWHE.to(wide).masked_fill(~valid_UW[:, :, None, None], 0.0)
        v_UHNE = torch.cat([past_v.transpose(1, 2), v_UHNE], dim=2)
    out_UHNE = torch.matmul(torch.softmax(scores, dim=-1), v_UHNE)
    return out_UHNE.transpose(1, 2).to(q_UNHE.dtype).contiguous()


@torch.library.custom_op("onetrans::history_attention", mutates_args=())
def history_attention_op(
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
    """The `torch.library` op; see `history_attention_reference`."""
    return history_attention_reference(q, k, v, q_start, length, past_k, past_v, past_length, slots)


@history_attention_op.register_kernel("cuda")
def _(
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
    """The Triton kernel in float16 and bfloat16; full precision, as of the gold and in training, is the reference's."""
    if q.dtype not in HALF:
        return history_attention_reference(q, k, v, q_start, length, past_k, past_v, past_length, slots)
    from onetrans.kernels.history_attention.kernel import history_attention_triton

    with torch.cuda.device(q.device):
        out: torch.Tensor = history_attention_triton(q, k, v, q_start, length, past_k, past_v, past_length, slots)
        return out


@history_attention_op.register_fake
def _(
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
    return q.new_empty(q.shape)


differentiate_by_reference(history_attention_op, history_attention_reference)
autocast_to_bfloat16(history_attention_op)


def history_attention(
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
    """See `history_attention_reference`; goes through the op where that is more than the reference (`through_op`)."""
    run = history_attention_op if through_op(q) else history_attention_reference
    return run(q, k, v, q_start, length, past_k, past_v, past_length, slots)
