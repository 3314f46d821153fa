"""state_value: an identity that names a user-scope value, so that a capture's state has names a runtime can rely on.

It does not decide what the state is; the scope analysis does, and erases the op.
"""

from __future__ import annotations

from typing import Any

import torch


@torch.library.custom_op("onetrans::state_value", mutates_args=())
def _state_value(x: torch.Tensor, name: str) -> torch.Tensor:
    return x.clone()


@_state_value.register_fake
def _(x: torch.Tensor, name: str) -> torch.Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    return None


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    return grad, None


_state_value.register_autograd(_backward, setup_context=_setup_context)


def state_value(x: torch.Tensor, name: str) -> torch.Tensor:
    """Names `x` for the split; outside a capture it is `x` itself."""
    return _state_value(x, name) if torch.compiler.is_exporting() else x
