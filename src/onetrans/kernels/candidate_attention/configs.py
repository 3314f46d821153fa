"""Launch configurations of candidate_attention."""

from __future__ import annotations

import dataclasses

from onetrans.kernels.launch.attention import candidates, tiles
from onetrans.kernels.launch.config import Device, LaunchConfig, Problem


def default(problem: Problem, device: Device) -> LaunchConfig:
    """Tiles of 64 rows, or as many as one candidate has; splits of 256 keys.

    One candidate of OneTrans-S has 12 rows, so 4 heads are 4 programs; five splits of a 1190-event window and the own
    blocks make 24, each with 4 tiles to go through in place of 20. Shorter splits would spend more on folding.
    """
    return dataclasses.replace(tiles(problem["E"], device, 64 if problem["P"] <= 64 else 128), split=256)


def space(problem: Problem, device: Device) -> list[LaunchConfig]:
    """What tuning tries: tiles that hold at least one candidate."""
    return [
        dataclasses.replace(config, split=split)
        for config in candidates(problem, device)
        for split in (256, 512, 1024)
        if config.block_m >= problem["P"]
    ]


def padded(positions: int) -> int:
    """Columns that a candidate's own block takes: a power of two, and at least 16, the depth of a matrix instruction.

    A candidate's weights then meet the same lanes and the same steps wherever it stands in a tile, so the order in
    which they are summed does not depend on its place.
    """
    return max(16, 1 << (positions - 1).bit_length())
