"""The contract of a pool: a fixed number of user slots, each holding one user's whole state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


class StatePool(ABC):
    """A fixed number of user slots on the backend's device, allocated once; each holds one user's whole state.

    Attributes:
        slots: How many users fit.
        nbytes: Bytes allocated: `slots` times the manifest's bytes per user.
    """

    slots: int
    nbytes: int

    @abstractmethod
    def lengths(self, slot: int) -> NDArray[np.int64]:
        """Valid tokens of each layer's window in a slot [layers]."""

    @abstractmethod
    def copy(self, source: int, target: int, drop: Sequence[int]) -> None:
        """Copies a slot's state; of layer l's window the first `drop[l]` tokens are left out."""

    @abstractmethod
    def read(self, slot: int) -> dict[str, NDArray[Any]]:
        """A copy on the host: every state tensor by name [1, …], windows cut to their valid tokens (at least one)."""

    @abstractmethod
    def write(self, slot: int, state: Arrays) -> None:
        """Takes what `read` gave."""
