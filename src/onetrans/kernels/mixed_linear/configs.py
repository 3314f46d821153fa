"""Launch configurations of mixed_linear."""

from __future__ import annotations

import itertools

from onetrans.kernels.launch.config import Device, LaunchConfig, Problem

LEAST = 16  # the matrix unit's smallest step, in columns and depth


def power(size: int, most: int) -> int:
    """The least power of two that holds `size`, between 16 and `most`."""
    return min(most, max(LEAST, 1 << (size - 1).bit_length()))


def default(problem: Problem, device: Device) -> LaunchConfig:
    """Tiles of 64 rows, the least that fill Hopper's matrix unit, by 128 columns in all.

    A request has hundreds of rows: 100 candidates of OneTrans-S (P = 12, F = 768) are 144 programs, and larger tiles
    would leave multiprocessors without work. Columns narrow to 64 where that wastes fewer.
    """
    widest = 64 if problem["gated"] else 128
    waste = {n: -problem["F"] % n for n in (64, widest)}
    block_n = power(problem["F"], widest if waste[widest] == waste[64] else 64)
    stages = 4 if device.capability >= 90 and device.capability < 120 else 3
    return LaunchConfig(block_m=64, block_n=block_n, block_k=power(problem["D"], 64), warps=4, stages=stages)


def space(problem: Problem, device: Device) -> list[LaunchConfig]:
    """What tuning tries: all that fits the device's shared memory and leaves a thread registers for more than sums.

    Four warps take 64 rows. block_k stays the default's, since the order in which a row's squares are summed follows it
    and would differ between a problem of many positions and one of their few.
    """
    grid = itertools.product((64, 128), (16, 32, 64, 128, 256), (4, 8), (2, 3, 4, 5))
    configs = [
        LaunchConfig(block_m=m, block_n=n, block_k=power(problem["D"], 64), warps=warps, stages=stages)
        for m, n, warps, stages in grid
        if n <= power(problem["F"], 256) and m * n * (1 + problem["gated"]) <= 96 * 32 * warps
    ]
    return [config for config in configs if shared_bytes(config, problem) <= device.shared_bytes]


def shared_bytes(config: LaunchConfig, problem: Problem) -> int:
    """An upper estimate: every stage's tiles of x and w, in 2-byte elements, or a float32 tile on its way out."""
    columns = config.block_n * (1 + problem["gated"])
    loads = 2 * config.stages * config.block_k * (config.block_m + columns)
    return max(loads, 4 * config.block_m * max(config.block_k, config.block_n)) + 1024
