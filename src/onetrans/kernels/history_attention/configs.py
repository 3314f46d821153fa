"""Launch configurations of history_attention."""

from __future__ import annotations

from onetrans.kernels.launch.attention import candidates, tiles
from onetrans.kernels.launch.config import Device, LaunchConfig, Problem


def default(problem: Problem, device: Device) -> LaunchConfig:
    """Tiles of 64 queries.

    A fresh prefill of 1190 events and 4 heads has 76 of them, fewer than a large GPU has multiprocessors, so that
    larger ones would leave more of it without work.
    """
    return tiles(problem["E"], device)


def space(problem: Problem, device: Device) -> list[LaunchConfig]:
    """What tuning tries."""
    return candidates(problem, device)
