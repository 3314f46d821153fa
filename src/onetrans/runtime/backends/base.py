"""What a backend does: prefill, append and decode, with the state kept where it computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class State:
    """What a prefill left for decode, for U users.

    Attributes:
        tensors: State name to the backend's own tensor; nothing but the backend looks inside.
        user_inputs: User-scope inputs that decode itself reads.
        length: S-tokens of each user since the start of the history [U].
    """

    tensors: Mapping[str, Any]
    user_inputs: Arrays
    length: NDArray[np.int64]


class Backend(ABC):
    """One engine with one bundle loaded. Inputs are those of `onetrans.features.encode`, checked by the caller."""

    @abstractmethod
    def prefill(self, inputs: Arrays) -> State:
        """Computes the state of U users from the user-scope inputs [U, …]."""

    @abstractmethod
    def append(self, state: State, inputs: Arrays) -> State:
        """The state grown by new events: `history_start` is each user's length in `state`.

        Exact only where `onetrans.features.windows.can_append` holds for every user; the caller checks.
        """

    @abstractmethod
    def decode(self, state: State, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        """Logits per task, float32 [U, C], of the candidate-scope inputs [U, C, …]."""

    @abstractmethod
    def state_arrays(self, state: State) -> dict[str, NDArray[Any]]:
        """A copy of the state's tensors on the host, for tests and reports."""
