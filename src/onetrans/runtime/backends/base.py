"""The contract of a backend: prefill, append and decode over a pool of states that stay where it computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onetrans.errors import ConfigError
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.manifest import Manifest
from onetrans.runtime.pools.base import Arrays, StatePool


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """What a backend may use.

    Attributes:
        threads: Threads of one graph run, from 1; None leaves the choice to the engine.
    """

    threads: int | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads is {self.threads}; it must be at least 1")


class Backend(ABC):
    """One engine on one device with one bundle loaded.

    Inputs are those of `onetrans.features.encode`, checked by the caller.

    Calls from several threads are safe as long as no two use one slot at a time.

    Attributes:
        manifest: The bundle's.
        device: Where it computes and keeps states.
        dtype: Dtype of the floating state tensors.
    """

    manifest: Manifest
    device: str
    dtype: str

    @abstractmethod
    def __init__(self, bundle: Bundle, options: BackendOptions) -> None:
        """Loads a bundle.

        Raises:
            BundleError: The engine cannot load a graph.
            MissingDependencyError: The engine's package, driver or device is absent.
        """

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
        are as they were. Exact only where `Pyramid.can_append` holds; the caller checks.

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
