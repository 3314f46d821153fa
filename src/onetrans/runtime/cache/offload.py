"""States that left the pool, in a file: loading one takes a quarter to a tenth of its prefill (OneTrans-S, cold)."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onetrans.errors import ConfigError, JobError
from onetrans.precision import BY_NAME, DType, narrow, widen
from onetrans.runtime.cache.config import OFFLOAD_PRECISIONS
from onetrans.runtime.cache.lookup import CacheEntry
from onetrans.runtime.cache.state_cache import Key
from onetrans.runtime.manifest import Manifest
from onetrans.spec import TensorSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Location:
    """Where a tensor stands within a slot of the file, and the dtype that it has there."""

    tensor: TensorSpec
    offset: int
    stored: DType

    @property
    def nbytes(self) -> int:
        return math.prod(self.tensor.shape_per_user) * BY_NAME[self.stored].nbytes


@dataclass(frozen=True, kw_only=True)
class _Offloaded:
    """What a slot of the file holds; `rows` are the tokens of each window."""

    slot: int
    entry: CacheEntry
    rows: Mapping[str, int]


class OffloadFile:
    """A fixed number of states in one file without a name, so that nothing is left of it when the process ends.

    The state written longest ago goes first. With `float16` a float32 state takes half the space, and half the time on
    a disk, and comes back rounded; a state of half precision is written as it is.
    """

    def __init__(self, manifest: Manifest, folder: Path, size: int, precision: str = "same") -> None:
        """Reserves the file's whole size at once, so that a full disk shows now and not under load.

        Args:
            manifest: Describes the states.
            folder: On the disk that is to be used.
            size: Bytes.
            precision: `same`, or `float16` for floating values that are wider than that.

        Raises:
            ConfigError: Less than one state fits.
            JobError: The folder cannot be written to, or has no room.
        """
        assert precision in OFFLOAD_PRECISIONS, precision  # which CacheConfig has checked
        self._locations: dict[str, _Location] = {}
        offset = 0
        for tensor in manifest.state:
            row = BY_NAME[tensor.dtype]
            rounds = precision == "float16" and row.is_float and row.nbytes > BY_NAME["float16"].nbytes
            location = _Location(tensor=tensor, offset=offset, stored="float16" if rounds else tensor.dtype)
            self._locations[tensor.name] = location
            offset += location.nbytes
        self.bytes_per_user = offset
        self.slots = size // offset
        if self.slots < 1:
            raise ConfigError(
                f"offload memory of {size} bytes holds no state of {offset} bytes; give at least {offset}"
            )
        try:
            with contextlib.ExitStack() as undo:
                self._file = undo.enter_context(
                    tempfile.TemporaryFile(prefix=".onetrans-states-", dir=folder, buffering=0)
                )
                os.posix_fallocate(self._file.fileno(), 0, self.slots * offset)
                undo.pop_all()
        except (OSError, OverflowError) as error:
            raise JobError(
                f"{folder} cannot take a file of {self.slots * offset} bytes for offloaded states ({error}); name"
                " another folder or give less offload memory"
            ) from error
        self._offloaded: OrderedDict[Key, _Offloaded] = OrderedDict()
        self._free = list(reversed(range(self.slots)))
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._offloaded)

    @property
    def descriptor(self) -> int:
        """File descriptor, for those who measure the file."""
        return self._file.fileno()

    def close(self) -> None:
        """Gives the disk's space back."""
        self._file.close()

    def look(self, key: Key) -> CacheEntry | None:
        """Finds what a user has in the file."""
        with self._lock:
            found = self._offloaded.get(key)
            return None if found is None else found.entry

    def put(self, key: Key, entry: CacheEntry, state: Mapping[str, NDArray[Any]]) -> bool:
        """Writes a state that `StatePool.read` gave.

        Returns:
            False where it was not: a value is too large for half precision, every slot is being read or written, or the
            disk failed, which is logged.
        """
        values = {}
        for name, location in self._locations.items():
            dtype, value = location.tensor.dtype, state[name][0]
            if location.stored != dtype:
                value = narrow(widen(value, dtype), location.stored)
                if not np.isfinite(value).all():
                    return False
            values[name] = np.ascontiguousarray(value)
        slot = self._reserve(key)
        if slot is None:
            return False
        try:
            for name, value in values.items():
                os.pwrite(self._file.fileno(), value.data, slot * self.bytes_per_user + self._locations[name].offset)
        except Exception as error:
            log.warning("a state could not be offloaded: %s", error)
            with self._lock:
                self._free.append(slot)
            return False
        rows = {name: len(value) for name, value in values.items() if self._locations[name].tensor.is_window}
        with self._lock:
            self._offloaded[key] = _Offloaded(slot=slot, entry=entry, rows=rows)
        return True

    def take(self, key: Key) -> dict[str, NDArray[Any]] | None:
        """Reads a state back for `StatePool.write`, and forgets it; None where there is none or the disk failed."""
        with self._lock:
            found = self._offloaded.pop(key, None)
        if found is None:
            return None
        try:
            return {name: self._read(location, found) for name, location in self._locations.items()}
        except OSError as error:
            log.warning("an offloaded state could not be read: %s", error)
            return None
        finally:
            with self._lock:
                self._free.append(found.slot)

    def forget(self, key: Key) -> bool:
        """Drops a user's state; whether there was one."""
        with self._lock:
            found = self._offloaded.pop(key, None)
            if found is not None:
                self._free.append(found.slot)
        return found is not None

    def clear(self, keep: Callable[[Key], bool] = lambda key: False) -> int:
        """Drops every state that is not to be kept; how many."""
        with self._lock:
            gone = [key for key in self._offloaded if not keep(key)]
            self._free.extend(self._offloaded.pop(key).slot for key in gone)
        return len(gone)

    def _read(self, location: _Location, found: _Offloaded) -> NDArray[Any]:
        tensor = location.tensor
        shape = tensor.shape_per_user
        if tensor.is_window:
            shape = (found.rows[tensor.name], *shape[1:])
        value = np.empty(shape, BY_NAME[location.stored].numpy)
        begin = found.slot * self.bytes_per_user + location.offset
        if os.preadv(self._file.fileno(), [value.data], begin) != value.nbytes:
            raise OSError(f"{tensor.name} is cut short")
        if location.stored != tensor.dtype:
            value = narrow(widen(value, location.stored), tensor.dtype)
        return value[None]

    def _reserve(self, key: Key) -> int | None:
        """A slot of the file for a key: a free one, or that of the state written first; None where all are busy."""
        with self._lock:
            old = self._offloaded.pop(key, None)
            if old is not None:
                return old.slot
            if self._free:
                return self._free.pop()
            return self._offloaded.popitem(last=False)[1].slot if self._offloaded else None
