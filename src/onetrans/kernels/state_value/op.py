"""state_value: an identity that says what a user-scope value is in the user's state: its name, role, layer, capacity.

It does not decide what the state is; the scope analysis does, and a pass turns the op into notes on the value's node.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

Role = Literal["key", "value", "lengths", "past_lengths", "other"]  # of `onetrans.spec`, and lengths before an append


@torch.library.custom_op("onetrans::state_value", mutates_args=())
def _state_value(x: torch.Tensor, name: str, role: str, layer: int | None, capacity: int) -> torch.Tensor:
    return x.clone()


@_state_value.register_fake
def _(x: torch.Tensor, name: str, role: str, layer: int | None, capacity: int) -> torch.Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    return None


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
    return grad, None, None, None, None


_state_value.register_autograd(_backward, setup_context=_setup_context)


def state_value(
    x: torch.Tensor, name: str, *, role: Role = "other", layer: int | None = None, capacity: int = 0
) -> torch.Tensor:
    """Says of `x` what it is in the state; outside a capture it is `x` itself.

    Args:
        x: A user-scope value, users on axis 0.
        name: What the state calls it.
        role: `key` or `value` of a layer's window [U, W, H, E]; `lengths`: valid tokens of every layer [U, layers];
            `past_lengths`: those of them that were there before an append; `other`: anything else.
        layer: The layer of a key or value, from 0.
        capacity: Most tokens of a user in a key or value.
    """
    assert role in get_args(Role), role
    return _state_value(x, name, role, layer, capacity) if torch.compiler.is_exporting() else x
