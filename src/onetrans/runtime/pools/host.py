"""State slots in host memory: one slab per state tensor, [slots, …]; a window's slab is [slots, capacity, H, E]."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onetrans.errors import MissingDependencyError
from onetrans.precision import BY_NAME
from onetrans.runtime.manifest import Manifest
from onetrans.runtime.pools.base import Arrays, StatePool
from onetrans.spec import TensorSpec

ALIGNMENT = 64  # bytes; a cache line, and what vector loads prefer


class HostPool(StatePool):
    """Slabs that a CPU backend reads and writes in place; every dtype of `onetrans.precision`, as it is stored."""

    def __init__(self, manifest: Manifest, slots: int) -> None:
        self.slots = slots
        self.tensors: Mapping[str, TensorSpec] = {spec.name: spec for spec in manifest.state}
        self.nbytes = slots * manifest.bytes_per_user
        self._names = {spec.identity: spec.name for spec in manifest.state}
        self._lengths = next(spec.name for spec in manifest.state if spec.is_lengths)
        self._scratch = _Scratch()
        try:
            self.slabs = {name: _zeros(spec, slots) for name, spec in self.tensors.items()}
        except (MemoryError, ValueError) as error:  # numpy's word for more than an address can hold
            raise MissingDependencyError(
                f"{self.nbytes} bytes for {slots} user states cannot be allocated; lower the state memory"
            ) from error
        assert sum(slab.nbytes for slab in self.slabs.values()) == self.nbytes

    def lengths(self, slot: int) -> NDArray[np.int64]:
        """See `StatePool.lengths`."""
        lengths: NDArray[np.int64] = self.slabs[self._lengths][slot]
        return lengths

    def fresh(self, slot: int, tokens: int) -> list[NDArray[Any]]:
        """Where a prefill of so many tokens writes: views [1, …] of every state tensor, in the manifest's order."""
        return [
            self.slabs[name][slot : slot + 1, :tokens] if spec.is_window else self.slabs[name][slot : slot + 1]
            for name, spec in self.tensors.items()
        ]

    def gather(self, specs: Iterable[TensorSpec], slots: Sequence[int]) -> dict[str, NDArray[Any]]:
        """State tensors of some users [U, …], windows as wide as the widest; views where there is one user.

        What several users' windows are gathered into belongs to the calling thread and holds until its next call.

        Args:
            specs: What a graph reads of the state; the tensors are found by role and layer, and keyed by these names.
            slots: One per user.
        """
        gathered = {}
        for spec in specs:
            slab, layer = self.slabs[self._names[spec.identity]], None if spec.state is None else spec.state.layer
            if layer is None:
                gathered[spec.name] = slab[slots[0] : slots[0] + 1] if len(slots) == 1 else slab[list(slots)]
                continue
            valid = [int(self.lengths(slot)[layer]) for slot in slots]
            width = max(1, *valid)
            if len(slots) == 1:
                gathered[spec.name] = slab[slots[0] : slots[0] + 1, :width]
                continue
            together = self._scratch.array(spec.name, (len(slots), width, *slab.shape[2:]), slab.dtype)
            for user, (slot, count) in enumerate(zip(slots, valid, strict=True)):
                together[user, :count] = slab[slot, :count]
                together[user, count:] = 0  # padding is masked, but only a finite value times 0 is 0
            gathered[spec.name] = together
        return gathered

    def store(self, slots: Sequence[int], made: Sequence[NDArray[Any]], kept: NDArray[np.int64]) -> None:
        """Puts what a graph made for some users behind the tokens that they keep.

        Args:
            slots: One per user.
            made: Every state tensor [U, …], in the manifest's order; windows hold the new tokens alone.
            kept: Tokens that each layer's window keeps [U, layers].
        """
        by_name = dict(zip(self.tensors, made, strict=True))
        lengths = by_name[self._lengths]
        for name, spec in self.tensors.items():
            layer = None if spec.state is None else spec.state.layer
            for user, slot in enumerate(slots):
                if layer is None:
                    self.slabs[name][slot] = by_name[name][user]
                else:
                    first, last = int(kept[user, layer]), int(lengths[user, layer])
                    self.slabs[name][slot, first:last] = by_name[name][user, : last - first]
                    if last == 0:
                        self.slabs[name][slot, 0] = 0  # read, masked, where the window is empty: must be finite

    def copy(self, source: int, target: int, drop: Sequence[int]) -> None:
        """See `StatePool.copy`."""
        lengths = self.lengths(source)
        for name, spec in self.tensors.items():
            slab, layer = self.slabs[name], None if spec.state is None else spec.state.layer
            if layer is None:
                slab[target] = slab[source]
            else:
                first, last = drop[layer], int(lengths[layer])
                slab[target, : max(0, last - first)] = slab[source, first:last]
        self.slabs[self._lengths][target] = np.maximum(lengths - np.asarray(drop), 0)

    def read(self, slot: int) -> dict[str, NDArray[Any]]:
        """See `StatePool.read`."""
        return {name: value.copy() for name, value in self.gather(self.tensors.values(), [slot]).items()}

    def write(self, slot: int, state: Arrays) -> None:
        """See `StatePool.write`."""
        for name, spec in self.tensors.items():
            if spec.is_window:
                self.slabs[name][slot, : state[name].shape[1]] = state[name][0]
            else:
                self.slabs[name][slot] = state[name][0]


class _Scratch(threading.local):
    """Arrays of each thread that grow and are used again."""

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[Any]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array of that shape; its content is left over."""
        count = math.prod(shape)
        if name not in self._arrays or self._arrays[name].size < count:
            self._arrays[name] = np.zeros(count, dtype)
        return self._arrays[name][:count].reshape(shape)


def _zeros(spec: TensorSpec, slots: int) -> NDArray[Any]:
    """A slab whose memory is there, not merely promised: too large a pool fails when it is made, not under load."""
    shape = (slots, *spec.shape_per_user)
    nbytes = slots * spec.bytes_per_user
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    raw.fill(0)
    begin = -raw.ctypes.data % ALIGNMENT
    return raw[begin : begin + nbytes].view(BY_NAME[spec.dtype].numpy).reshape(shape)
