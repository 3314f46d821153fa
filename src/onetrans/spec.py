"""What a tensor that travels between rooms says of itself: name, dtype, shape, scope, and its part in a user's state.

Names are for people and files. Code decides by scope, role and layer, never by how a name is spelt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from onetrans.precision import BY_NAME, DType

Scope = Literal["user", "candidate"]
Role = Literal["key", "value", "lengths", "other"]
ROLES: tuple[Role, ...] = get_args(Role)
CACHED: tuple[Role, ...] = ("key", "value")


@dataclass(frozen=True, kw_only=True)
class State:
    """A tensor's part in the state that crosses from prefill to decode.

    Attributes:
        role: `key` and `value` hold the tokens of a layer's window, token axis 1, and grow by appends; `lengths` holds
            the valid tokens of every layer [U, layers]; `other` is made anew by every prefill and append.
        layer: The layer of a key or value, from 0; None for the other roles.
        capacity: Most tokens of a user in a key or value; 0 for the other roles.
    """

    role: Role
    layer: int | None = None
    capacity: int = 0

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"state role {self.role!r} is not one of {', '.join(ROLES)}")
        windowed = self.role in CACHED
        if windowed != (self.layer is not None) or windowed != (self.capacity > 0):
            raise ValueError(f"a state of role {self.role} has layer {self.layer} and capacity {self.capacity}")


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor that a graph takes or gives.

    Attributes:
        name: Unique among the graph's inputs, and among its outputs.
        dtype: Ids and lengths are int64, numbers float32; weights, activations and state may be of half precision.
        dims: Symbols such as `U`, `L`, `C`, expressions of them such as `min(L, 79)`, and fixed sizes.
        scope: When the value is known.
        state: Its part in the state; None for features and logits.
    """

    name: str
    dtype: DType
    dims: tuple[str | int, ...]
    scope: Scope
    state: State | None = None

    @property
    def is_window(self) -> bool:
        """Whether it holds the tokens of a layer's window, so that its axis 1 is as long as the user's window."""
        return self.state is not None and self.state.layer is not None

    @property
    def is_lengths(self) -> bool:
        """Whether it holds the valid tokens of every layer's window [U, layers]."""
        return self.state is not None and self.state.role == "lengths"

    @property
    def identity(self) -> tuple[Role, int | str]:
        """Which tensor of the state this is, the same in every graph whatever its name there."""
        assert self.state is not None, f"{self.name} is no state"
        if self.state.layer is not None:
            return self.state.role, self.state.layer
        return self.state.role, self.name

    @property
    def shape_per_user(self) -> tuple[int, ...]:
        """The shape that a user's state takes at most, without the axis of users."""
        assert self.state is not None, f"{self.name} is no state"
        capacity = (self.state.capacity,) if self.is_window else ()
        return (*capacity, *(int(dim) for dim in self.dims[1 + len(capacity) :]))

    @property
    def bytes_per_user(self) -> int:
        """Bytes that a user's state takes at most."""
        return math.prod(self.shape_per_user) * BY_NAME[self.dtype].nbytes
