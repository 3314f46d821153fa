"""States that left the pool, in a file: loading one takes a quarter to a tenth of its prefill (OneTrans-S, cold)."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from onetrans.errors import ConfigError, JobError
from onetrans.precision import BY_NAME
from onetrans.runtime.cache.lookup import Held
from onetrans.runtime.cache.state_cache import Key
from onetrans.runtime.manifest import Manifest

log = logging.getLogger(__name__)

SpillPrecision = Literal["same", "float16"]


@dataclass(frozen=True)
class _Place:
    """Where a tensor stands within a slot of the file."""

    offset: int
    stored: np.dtype[Any]
    used: np.dtype[Any]
    row: tuple[int, ...]  # shape of one token of a window; of the whole tensor where it is no window
    window: bool


@dataclass(frozen=True)
class _Spilled:
    slot: int
    held: Held
    rows: Mapping[str, int]


class SpillFile:
    """A fixed number of states in one file without a name, so that nothing is left of it when the process ends.

    The least recently spilled go first. With `float16` half the space, and half the time on a disk, buys an error of
    half-precision rounding in what is read back.
    """

    def __init__(self, manifest: Manifest, folder: Path, size: int, precision: SpillPrecision = "same") -> None:
        """Reserves the file's whole size at once, so that a full disk shows now and not under load.

        Args:
            manifest: Whose states.
            folder: Where the disk is.
            size: Bytes.
            precision: Of floating values in the file.

        Raises:
            ConfigError: An unknown precision, or less than one state fits.
            JobError: The folder cannot be written to, or has no room.
        """
        if precision not in get_args(SpillPrecision):
            raise ConfigError(f"spill precision {precision!r} is not one of {', '.join(get_args(SpillPrecision))}")
        self._places: dict[str, _Place] = {}
        offset = 0
        for tensor in manifest.state:
            used = BY_NAME[tensor.dtype].numpy
            half = precision == "float16" and used.kind == "f"
            stored = np.dtype(np.float16) if half else used
            window = tensor.is_window
            shape = tensor.shape_per_user
            self._places[tensor.name] = _Place(offset, stored, used, shape[1:] if window else shape, window)
            offset += int(np.prod(shape)) * stored.itemsize
        self.bytes_per_user = offset
        self.slots = size // offset
        if self.slots < 1:
            raise ConfigError(f"spill memory of {size} bytes holds no state of {offset} bytes; give at least {offset}")
        try:
            with contextlib.ExitStack() as undo:
                self._file = undo.enter_context(
                    tempfile.TemporaryFile(prefix=".onetrans-states-", dir=folder, buffering=0)
                )
                os.posix_fallocate(self._file.fileno(), 0, self.slots * offset)
                undo.pop_all()
        except (OSError, OverflowError) as error:
            raise JobError(
                f"{folder} cannot take a file of {self.slots * offset} bytes for spilled states ({error}); name another"
                " folder or give less spill memory"
            ) from error
        self._held: OrderedDict[Key, _Spilled] = OrderedDict()
        self._free = list(reversed(range(self.slots)))
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def descriptor(self) -> int:
        """Of the open file, for those who measure it."""
        return self._file.fileno()

    def close(self) -> None:
        """Gives the disk's space back."""
        self._file.close()

    def look(self, key: Key) -> Held | None:
        """What is spilled of a user."""
        with self._lock:
            spilled = self._held.get(key)
            return None if spilled is None else spilled.held

    def put(self, key: Key, held: Held, state: Mapping[str, NDArray[Any]]) -> bool:
        """Writes a state that `StatePool.read` gave.

        Returns:
            False where it was not: a value is too large for half precision, every slot is being read or written, or the
            disk failed, which is logged.
        """
        values = {}
        for name, place in self._places.items():
            with np.errstate(over="ignore"):
                value = np.ascontiguousarray(state[name][0], dtype=place.stored)
            if value.dtype != state[name].dtype and not np.isfinite(value).all():
                return False
            values[name] = value
        slot = self._reserve(key)
        if slot is None:
            return False
        try:
            for name, value in values.items():
                os.pwrite(self._file.fileno(), value.data, slot * self.bytes_per_user + self._places[name].offset)
        except Exception as error:
            log.warning("a state could not be spilled: %s", error)
            with self._lock:
                self._free.append(slot)
            return False
        rows = {name: len(value) for name, value in values.items() if self._places[name].window}
        with self._lock:
            self._held[key] = _Spilled(slot, held, rows)
        return True

    def take(self, key: Key) -> dict[str, NDArray[Any]] | None:
        """Reads a state back for `StatePool.write`, and forgets it; None where there is none or the disk failed."""
        with self._lock:
            spilled = self._held.pop(key, None)
        if spilled is None:
            return None
        try:
            return {name: self._read(place, spilled, name) for name, place in self._places.items()}
        except OSError as error:
            log.warning("a spilled state could not be read: %s", error)
            return None
        finally:
            with self._lock:
                self._free.append(spilled.slot)

    def forget(self, key: Key) -> bool:
        """Drops a user's state; whether there was one."""
        with self._lock:
            spilled = self._held.pop(key, None)
            if spilled is not None:
                self._free.append(spilled.slot)
        return spilled is not None

    def clear(self, keep: Callable[[Key], bool] = lambda key: False) -> int:
        """Drops every state that is not to be kept; how many."""
        with self._lock:
            gone = [key for key in self._held if not keep(key)]
            self._free.extend(self._held.pop(key).slot for key in gone)
        return len(gone)

    def _read(self, place: _Place, spilled: _Spilled, name: str) -> NDArray[Any]:
        shape = (spilled.rows[name], *place.row) if place.window else place.row
        value = np.empty(shape, place.stored)
        begin = spilled.slot * self.bytes_per_user + place.offset
        if os.preadv(self._file.fileno(), [value.data], begin) != value.nbytes:
            raise OSError(f"{name} is cut short")
        return value.astype(place.used, copy=False)[None]

    def _reserve(self, key: Key) -> int | None:
        """A slot of the file for a key: a free one, or that of the state spilled first; None where all are busy."""
        with self._lock:
            old = self._held.pop(key, None)
            if old is not None:
                return old.slot
            if self._free:
                return self._free.pop()
            return self._held.popitem(last=False)[1].slot if self._held else None
