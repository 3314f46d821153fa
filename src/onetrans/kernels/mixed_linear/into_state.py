"""keys_into_state: the projection to keys and values, written straight into the users' slabs of state."""

from __future__ import annotations

import torch

from onetrans.kernels.define import define_op
from onetrans.kernels.mixed_linear.op import mixed_linear_reference


def keys_into_state_reference(
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
    """Token i < length[u] of user u puts its K and V, mixed_linear's two halves, at [slots[u], first[u] + i].

    Nothing else of the slabs changes; what would lie beyond a slab's W tokens is left out.

    Args:
        x: Tokens [1, U * N, D], a user's N together.
        w: Weights [1, D, 2 * H * E], of keys and then of values.
        gain: RMSNorm gain [D] or [1, D], or None.
        eps: Added to the mean square.
        bias: [1, 2 * H * E] or None.
        k_state: Slabs of keys [slots, W, H, E], written.
        v_state: Slabs of values, likewise.
        slots: The slab of each user [U], int64; no two users share one.
        first: Where its first new token goes [U], int64, from 0.
        length: Its valid new tokens [U], int64, from 0.
    """
    U, (_, W, H, E) = slots.shape[0], k_state.shape
    if U == 0:
        return
    kv = mixed_linear_reference(x, w, gain, eps, bias).view(U, -1, 2, H, E)
    token_N = torch.arange(kv.shape[1], device=x.device)
    goal_UN = first[:, None] + token_N
    user, token = ((token_N < length[:, None]) & (goal_UN < W)).nonzero(as_tuple=True)
    at = (slots[user], goal_UN[user, token])
    k_state.index_put_(at, kv[user, token, 0])
    v_state.index_put_(at, kv[user, token, 1])


keys_into_state_op, keys_into_state = define_op(
    "keys_into_state",
    keys_into_state_reference,
    fake=lambda *_: None,
    kernel="onetrans.kernels.mixed_linear.kernel:keys_into_state_triton",
    mutates=("k_state", "v_state"),
    gradient=False,
    autocast=False,
)
