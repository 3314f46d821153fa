"""keys_into_state: the projection to keys and values, written straight into the users' slabs of state."""

from __future__ import annotations

import torch

from onetrans.kernels.dispatch import HALF
from onetrans.kernels.mixed_linear.op import mixed_linear_reference


def keys_into_state_reference(
    x_1BD: torch.Tensor,
    w_1DF: torch.Tensor,
    gain: torch.Tensor | None,
    eps: float,
    bias_1F: torch.Tensor | None,
    k_state_SWHE: torch.Tensor,
    v_state_SWHE: torch.Tensor,
    slots_U: torch.Tensor,
    first_U: torch.Tensor,
    length_U: torch.Tensor,
) -> None:
    """Token i < length[u] of user u puts its K and V, mixed_linear's two halves, at [slots[u], first[u] + i].

    Nothing else of the slabs changes; what would lie beyond a slab's W tokens is left out.

    Args:
        x_1BD: Tokens [1, U * N, D], a user's N together.
        w_1DF: Weights [1, D, 2 * H * E], of keys and then of values.
        gain: RMSNorm gain [D] or [1, D], or None.
        eps: Added to the mean square.
        bias_1F: [1, 2 * H * E] or None.
        k_state_SWHE: Slabs of keys [slots, W, H, E], written.
        v_state_SWHE: Slabs of values, likewise.
        slots_U: The slab of each user [U], int64; no two users share one.
        first_U: Where its first new token goes [U], int64, from 0.
        length_U: Its valid new tokens [U], int64, from 0.
    """
    U, (_, W, H, E) = slots_U.shape[0], k_state_SWHE.shape
    if U == 0:
        return
    kv = mixed_linear_reference(x_1BD, w_1DF, gain, eps, bias_1F).view(U, -1, 2, H, E)
    token_N = torch.arange(kv.shape[1], device=x_1BD.device)
    goal_UN = first_U[:, None] + token_N
    user, token = ((token_N < length_U[:, None]) & (goal_UN < W)).nonzero(as_tuple=True)
    at = (slots_U[user], goal_UN[user, token])
    k_state_SWHE.index_put_(at, kv[user, token, 0])
    v_state_SWHE.index_put_(at, kv[user, token, 1])


@torch.library.custom_op("onetrans::keys_into_state", mutates_args=("k_state", "v_state"))
def keys_into_state(
    x: torch.Tensor,
    w: torch.Tensor,
    gain: torch.Tensor | None,
    eps: float,
    bias: torch.Tensor | None,
    k_state: torch.Tensor,
    v_state: torch.Tensor,
    slots: torch.Tensor,
    first: torch.Tensor,
    length: torch.Tensor,
) -> None:
    """The `torch.library` op, without a gradient; see `keys_into_state_reference`."""
    keys_into_state_reference(x, w, gain, eps, bias, k_state, v_state, slots, first, length)


@keys_into_state.register_kernel("cuda")
def _(
    x: torch.Tensor,
    w: torch.Tensor,
    gain: torch.Tensor | None,
    eps: float,
    bias: torch.Tensor | None,
    k_state: torch.Tensor,
    v_state: torch.Tensor,
    slots: torch.Tensor,
    first: torch.Tensor,
    length: torch.Tensor,
) -> None:
    """The Triton kernel in float16 and bfloat16; full precision is the reference's."""
    if x.dtype not in HALF:
        keys_into_state_reference(x, w, gain, eps, bias, k_state, v_state, slots, first, length)
        return
    from onetrans.kernels.mixed_linear.kernel import keys_into_state_triton

    with torch.cuda.device(x.device):
        keys_into_state_triton(x, w, gain, eps, bias, k_state, v_state, slots, first, length)


@keys_into_state.register_fake
def _(
    x: torch.Tensor,
    w: torch.Tensor,
    gain: torch.Tensor | None,
    eps: float,
    bias: torch.Tensor | None,
    k_state: torch.Tensor,
    v_state: torch.Tensor,
    slots: torch.Tensor,
    first: torch.Tensor,
    length: torch.Tensor,
) -> None:
    return None
