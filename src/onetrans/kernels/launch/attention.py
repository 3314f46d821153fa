"""What both attentions' launch configurations share: the same tiles pass through the same loop."""

from __future__ import annotations

import itertools

from onetrans.kernels.launch.config import Device, LaunchConfig, Problem


def tiles(E: int, device: Device, rows: int = 64) -> LaunchConfig:
    """Tiles of 64 queries by 64 keys on Hopper, whose matrix instructions take 64 rows; by 32 keys elsewhere.

    Accumulators of 64 by E, scores and addresses must fit a thread's 255 registers: Ampere holds all of them there, and
    Blackwell's pass through them on their way to tensor memory, so both take fewer keys. Whether 4 or 8 warps share
    them is what the assembler was seen to do without spilling.
    """
    if device.capability < 90 and E <= 32:
        return LaunchConfig(block_m=rows, block_n=64, warps=rows // 16, stages=2)
    if device.capability < 90:
        return LaunchConfig(block_m=rows, block_n=32, warps=8 if E > 64 else rows // 16, stages=3)
    if device.capability >= 100:
        return LaunchConfig(block_m=rows, block_n=32, warps=8 if E <= 64 else rows // 16, stages=3)
    return LaunchConfig(block_m=rows, block_n=64, warps=8 if E > 96 else rows // 16, stages=3 if E <= 96 else 2)


def candidates(problem: Problem, device: Device) -> list[LaunchConfig]:
    """What tuning tries: all that fits the device's shared memory, with 8 or 16 rows to a warp."""
    grid = itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
    configs = [LaunchConfig(block_m=m, block_n=n, warps=w, stages=s) for m, n, w, s in grid if m // w in (8, 16)]
    return [config for config in configs if shared_bytes(config, problem["E"]) <= device.shared_bytes]


def shared_bytes(config: LaunchConfig, E: int) -> int:
    """An upper estimate: the query tile, and K and V tiles of every pipeline stage, in 2-byte elements."""
    return 2 * E * (config.block_m + 2 * config.stages * config.block_n)
