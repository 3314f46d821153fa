"""How much the cache may hold and what it may do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from onetrans.errors import ConfigError
from onetrans.runtime.cache.lookup import STALE_CROSSINGS, Reuse
from onetrans.runtime.cache.spill import SpillPrecision

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
WORKING = 8


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The state cache of a Ranker.

    Attributes:
        state_memory: Bytes for all states, cached and being computed. 0 caches nothing.
        working: Users computed at a time, by all threads together; each takes a slot of that memory. Never more than a
            quarter of the slots.
        ttl: Seconds after which a state is no longer used, counted from when something of it was last computed (by a
            prefill, an append or for another context); a plain reuse does not prolong it. None for no limit.
        reuse: `exact`: scores are those of a fresh prefill. `stale`: a state is carried across anchors, which moves the
            scores; the drift is measured.
        stale_crossings: Anchors that a stale state is carried across at most.
        drift_every: Of the stale requests every so many is prefilled as well, to measure the drift; that state stays.
        spill: Folder on the disk that takes states which must leave the memory; None for none.
        spill_memory: Bytes there.
        spill_precision: `same`, or `float16` for half the bytes and rounded states.
    """

    state_memory: int = 0
    working: int = WORKING
    ttl: float | None = None
    reuse: Reuse = "exact"
    stale_crossings: int = STALE_CROSSINGS
    drift_every: int = 100
    spill: Path | None = None
    spill_memory: int = 0
    spill_precision: SpillPrecision = "same"

    def __post_init__(self) -> None:
        if self.reuse not in get_args(Reuse):
            raise ConfigError(f"reuse {self.reuse!r} is not one of {', '.join(get_args(Reuse))}")
        for name, least in (("state_memory", 0), ("working", 1), ("stale_crossings", 1), ("drift_every", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if (self.spill is None) != (self.spill_memory == 0):
            raise ConfigError("spill names a folder and spill_memory bytes; give both or neither")
        if self.spill is not None and not self.state_memory:
            raise ConfigError("states are spilled from the state memory; give state_memory as well")

    def slots(self, bytes_per_user: int) -> tuple[int, int]:
        """Slots in all, and those kept for states being computed.

        Raises:
            ConfigError: The memory does not hold one cached user beside one being computed.
        """
        if not self.state_memory:
            return self.working, self.working
        slots = self.state_memory // bytes_per_user
        if slots < 2:
            raise ConfigError(
                f"state memory of {self.state_memory} bytes holds {slots} users of {bytes_per_user} bytes; give at"
                f" least {2 * bytes_per_user}: one cached, one being computed"
            )
        return slots, min(self.working, max(1, slots // 4))


def parse_bytes(text: str) -> int:
    """Bytes of a size such as `4GiB`, `500 MB` or `1073741824`.

    Raises:
        ConfigError: Not a size.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise ConfigError(f"{text!r} is not a size; give a number with B, KB, MB, GB, KiB, MiB, GiB or TiB, as 4GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])
