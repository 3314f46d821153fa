"""The contract of a backend: state slots, prefill, append and decode, with the state kept where it computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onetrans.runtime.manifest import Manifest

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


class Backend(ABC):
    """One engine with one bundle loaded. Inputs are those of `onetrans.features.encode`, checked by the caller.

    Calls from several threads are safe as long as no two use one slot at a time.

    Attributes:
        manifest: The bundle's.
        device: Where it computes and keeps states.
        dtype: Of the floating state tensors.
    """

    manifest: Manifest
    device: str
    dtype: str

    @abstractmethod
    def allocate(self, slots: int) -> StatePool:
        """A pool of user slots.

        Raises:
            MissingDependencyError: They do not fit into the device's memory.
        """

    @abstractmethod
    def prefill(self, pool: StatePool, slots: Sequence[int], inputs: Arrays) -> None:
        """Computes the states of U users from the user-scope inputs [U, …] into one slot each."""

    @abstractmethod
    def append(self, pool: StatePool, slots: Sequence[int], inputs: Arrays) -> None:
        """Grows the states in `slots` by new events in place; `history_start` is each user's length before.

        Of a user without new events, only what depends on profile and context is made anew. Should it fail, the states
        are as they were. Exact only where `onetrans.features.windows.can_append` holds; the caller checks.

        Raises:
            BundleError: The bundle has no append graph.
        """

    @abstractmethod
    def decode(
        self, pool: StatePool, slots: Sequence[int], inputs: Arrays, counts: NDArray[np.int64]
    ) -> dict[str, NDArray[np.float32]]:
        """Logits per task, float32 [U, C]; what stands behind a user's own candidates means nothing.

        Args:
            pool: Holds the states.
            slots: One per user.
            inputs: Candidate-scope inputs [U, C, …], and user-scope inputs [U, …] where decode itself reads any.
            counts: Candidates of each user [U], 1 to C.
        """
