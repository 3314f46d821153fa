"""How much the cache may hold and what it may do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from onetrans.errors import ConfigError
from onetrans.runtime.cache.lookup import STALE_CROSSINGS, Reuse

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
COMPUTE_SLOTS = 8
OFFLOAD_PRECISIONS = ("same", "float16")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The state cache of a Ranker.

    Attributes:
        state_memory: Bytes for all states, cached and being computed. 0 caches nothing.
        compute_slots: Slots of that memory kept for states being computed: the most users that all threads together
            prefill at a time. Never more than a quarter of the slots.
        ttl: Seconds after which a state is no longer used, counted from when something of it was last computed (by a
            prefill, an append or for another context); a plain reuse does not prolong it. None for no limit.
        reuse: `exact`: scores are those of a fresh prefill. `stale`: a state is carried across anchors, which moves the
            scores; the drift is measured.
        stale_crossings: Anchors that a stale state is carried across at most.
        drift_every: One in so many stale requests is prefilled as well, to measure the drift; that state stays.
        offload: Folder on the disk that takes states which must leave the memory; None for none.
        offload_memory: Bytes there.
        offload_precision: `same`, or `float16` for half the bytes of a float32 state, which is then rounded.
    """

    state_memory: int = 0
    compute_slots: int = COMPUTE_SLOTS
    ttl: float | None = None
    reuse: Reuse = "exact"
    stale_crossings: int = STALE_CROSSINGS
    drift_every: int = 100
    offload: Path | None = None
    offload_memory: int = 0
    offload_precision: str = "same"

    def __post_init__(self) -> None:
        for name, allowed in (("reuse", get_args(Reuse)), ("offload_precision", OFFLOAD_PRECISIONS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")
        for name, least in (("state_memory", 0), ("compute_slots", 1), ("stale_crossings", 1), ("drift_every", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if (self.offload is None) != (self.offload_memory == 0):
            raise ConfigError("offload names a folder and offload_memory bytes; give both or neither")
        if self.offload is not None and not self.state_memory:
            raise ConfigError("states are offloaded from the state memory; give state_memory as well")

    def slots(self, bytes_per_user: int) -> tuple[int, int]:
        """Slots in all, and those kept for states being computed.

        Raises:
            ConfigError: The memory does not hold one cached user beside one being computed.
        """
        if not self.state_memory:
            return self.compute_slots, self.compute_slots
        slots = self.state_memory // bytes_per_user
        if slots < 2:
            raise ConfigError(
                f"state memory of {self.state_memory} bytes holds {slots} users of {bytes_per_user} bytes; give at"
                f" least {2 * bytes_per_user}: one cached, one being computed"
            )
        return slots, min(self.compute_slots, max(1, slots // 4))


def parse_bytes(text: str) -> int:
    """Bytes of a size such as `4GiB`, `500 MB` or `1073741824`.

    Raises:
        ConfigError: Not a size.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise ConfigError(f"{text!r} is not a size; give a number with B, KB, MB, GB, KiB, MiB, GiB or TiB, as 4GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])
