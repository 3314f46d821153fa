"""State slots in host memory: one slab per state tensor, [slots, …]; a window's slab is [slots, capacity, H, E]."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onetrans.errors import MissingDependencyError
from onetrans.runtime.backends.base import Arrays, StatePool
from onetrans.runtime.manifest import Manifest, StateTensor

ALIGNMENT = 64  # bytes; a cache line, and what vector loads prefer


class HostPool(StatePool):
    """Slabs that a CPU backend reads and writes in place."""

    def __init__(self, manifest: Manifest, slots: int) -> None:
        self.slots = slots
        self.tensors: Mapping[str, StateTensor] = {tensor.spec.name: tensor for tensor in manifest.state}
        self.nbytes = slots * manifest.bytes_per_user
        self._scratch = _Scratch()
        try:
            self.slabs = {name: _zeros(tensor, slots) for name, tensor in self.tensors.items()}
        except (MemoryError, ValueError) as error:  # numpy's word for more than an address can hold
            raise MissingDependencyError(
                f"{self.nbytes} bytes for {slots} user states cannot be allocated; lower the state memory"
            ) from error
        assert sum(slab.nbytes for slab in self.slabs.values()) == self.nbytes

    def lengths(self, slot: int) -> NDArray[np.int64]:
        """See `StatePool.lengths`."""
        lengths: NDArray[np.int64] = self.slabs["lengths"][slot]
        return lengths

    def fresh(self, slot: int, tokens: int) -> dict[str, NDArray[Any]]:
        """Where a prefill of so many tokens writes: views [1, …] of every state tensor."""
        return {
            name: slab[slot : slot + 1] if self.tensors[name].window is None else slab[slot : slot + 1, :tokens]
            for name, slab in self.slabs.items()
        }

    def gather(self, names: Iterable[str], slots: Sequence[int]) -> dict[str, NDArray[Any]]:
        """State tensors of some users [U, …], windows as wide as the widest; views where there is one user.

        What several users' windows are gathered into belongs to the calling thread and holds until its next call.
        """
        gathered = {}
        for name in names:
            slab, layer = self.slabs[name], self.tensors[name].window
            if layer is None:
                gathered[name] = slab[slots[0] : slots[0] + 1] if len(slots) == 1 else slab[list(slots)]
                continue
            valid = [int(self.lengths(slot)[layer]) for slot in slots]
            width = max(1, *valid)
            if len(slots) == 1:
                gathered[name] = slab[slots[0] : slots[0] + 1, :width]
                continue
            together = self._scratch.array(name, (len(slots), width, *slab.shape[2:]), slab.dtype)
            for user, (slot, count) in enumerate(zip(slots, valid, strict=True)):
                together[user, :count] = slab[slot, :count]
                together[user, count:] = 0  # padding is masked, but only a finite value times 0 is 0
            gathered[name] = together
        return gathered

    def store(self, slots: Sequence[int], made: Arrays, held: NDArray[np.int64]) -> None:
        """Puts what a graph made for some users behind the tokens they hold.

        Args:
            slots: One per user.
            made: Every state tensor [U, …]; windows hold the new tokens alone.
            held: Tokens that each layer's window keeps [U, layers].
        """
        for name, tensor in self.tensors.items():
            for user, slot in enumerate(slots):
                if tensor.window is None:
                    self.slabs[name][slot] = made[name][user]
                else:
                    first, last = int(held[user, tensor.window]), int(made["lengths"][user, tensor.window])
                    self.slabs[name][slot, first:last] = made[name][user, : last - first]
                    if last == 0:
                        self.slabs[name][slot, 0] = 0  # read, masked, where the window is empty: must be finite

    def copy(self, source: int, target: int, drop: Sequence[int]) -> None:
        """See `StatePool.copy`."""
        lengths = self.lengths(source)
        for name, tensor in self.tensors.items():
            slab = self.slabs[name]
            if tensor.window is None:
                slab[target] = slab[source]
            else:
                first, last = drop[tensor.window], int(lengths[tensor.window])
                slab[target, : max(0, last - first)] = slab[source, first:last]
        self.slabs["lengths"][target] = np.maximum(lengths - np.asarray(drop), 0)

    def read(self, slot: int) -> dict[str, NDArray[Any]]:
        """See `StatePool.read`."""
        return {name: value.copy() for name, value in self.gather(self.tensors, [slot]).items()}

    def write(self, slot: int, state: Arrays) -> None:
        """See `StatePool.write`."""
        for name, tensor in self.tensors.items():
            if tensor.window is None:
                self.slabs[name][slot] = state[name][0]
            else:
                self.slabs[name][slot, : state[name].shape[1]] = state[name][0]


class _Scratch(threading.local):
    """Arrays of each thread that grow and are used again."""

    def __init__(self) -> None:
        self._held: dict[str, NDArray[Any]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array of that shape; its content is left over."""
        count = math.prod(shape)
        if name not in self._held or self._held[name].size < count:
            self._held[name] = np.zeros(count, dtype)
        return self._held[name][:count].reshape(shape)


def _zeros(tensor: StateTensor, slots: int) -> NDArray[Any]:
    """A slab whose memory is there, not merely promised: too large a pool fails when it is made, not under load."""
    dtype = np.dtype(tensor.spec.dtype)
    shape = (slots, *tensor.shape_per_user)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    raw.fill(0)
    begin = -raw.ctypes.data % ALIGNMENT
    return raw[begin : begin + nbytes].view(dtype).reshape(shape)
