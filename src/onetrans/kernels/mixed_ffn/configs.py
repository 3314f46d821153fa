"""Launch configurations of mixed_ffn."""

from __future__ import annotations

import itertools
from dataclasses import replace

from onetrans.kernels.launch.config import Device, LaunchConfig, Problem

WIDEST = 384  # a row tile's sums of 64 by 384 are 96 registers of each of 256 threads


def parts(D: int) -> tuple[int, int]:
    """The model width as one or two powers of two, of at least 16: 384 is 256 + 128, and is not padded to 512.

    Raises:
        ValueError: It is neither, or wider than 384; such a model takes the unfused path.
    """
    main = 1 << (D.bit_length() - 1)
    rest = D - main
    if main < 16 or D > WIDEST or (rest and (rest < 16 or rest & (rest - 1))):
        raise ValueError(
            f"D is {D}; the fused mixed_ffn takes 16 to {WIDEST} that are one or two powers of two, as 384 = 256 + 128"
        )
    return main, rest


def default(problem: Problem, device: Device) -> LaunchConfig:
    """Two launches of mixed_linear.

    One fused row tile streams all weights of a position through one multiprocessor. 100 candidates of OneTrans-S are 24
    row tiles, of 12 positions by two: they would leave 108 of an H200's 132 multiprocessors, and of its ways to memory,
    idle, where the two launches have 192 and 48 programs. What fusing saves, F wide rows to L2 and back, is less.
    """
    return replace(fused(problem, device), fused=False)


def fused(problem: Problem, device: Device) -> LaunchConfig:
    """The fused kernel's tiles: as many of the F hidden columns a step as leave room for two steps in shared memory."""
    block_m = 64 if device.capability in (80, 90, 100) else 32
    for block_n, stages in ((64, 3), (64, 2), (32, 3), (32, 2), (16, 2)):
        config = LaunchConfig(block_m=block_m, block_n=block_n, warps=8, stages=stages, fused=True)
        if shared_bytes(config, problem) <= device.shared_bytes:
            return config
    return config


def space(problem: Problem, device: Device) -> list[LaunchConfig]:
    """What tuning tries: the two launches, and all fused tiles that fit the device's shared memory."""
    plain = default(problem, device)
    try:
        parts(problem["D"])
    except ValueError:
        return [plain]
    grid = itertools.product((64, 128), (16, 32, 64), (4, 8), (2, 3))
    configs = [LaunchConfig(block_m=m, block_n=n, warps=w, stages=s, fused=True) for m, n, w, s in grid]
    return [
        plain,
        *(
            config
            for config in configs
            if shared_bytes(config, problem) <= device.shared_bytes
            and config.block_m * (problem["D"] + config.block_n * (1 + problem["gated"])) <= 128 * 32 * config.warps
        ),
    ]


def shared_bytes(config: LaunchConfig, problem: Problem) -> int:
    """An upper estimate of the fused kernel's: the tile of x, and both weights' tiles of every pipeline stage."""
    weights = problem["D"] * config.block_n * (2 + problem["gated"])
    return 2 * (config.block_m * problem["D"] + config.stages * weights) + 1024
