"""The terms of a launch: what is to be computed, on which device, and in which tiles."""

from __future__ import annotations

from dataclasses import dataclass

SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """One way to launch a kernel; every distinct one is a compiled variant.

    Attributes:
        block_m: Rows of a tile.
        block_n: Keys (attention) or output columns (products) of a tile.
        block_k: Depth of one step of a product; 0 in attention, whose depth is head_dim.
        split: Keys that one program sums before results are folded; 0 where a kernel does not split.
        warps: Warps of a program.
        stages: Depth of the load pipeline.
        fused: Both products of mixed_ffn in one kernel.
    """

    block_m: int
    block_n: int
    block_k: int = 0
    split: int = 0
    warps: int = 4
    stages: int = 3
    fused: bool = False


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a configuration may depend on.

    Attributes:
        capability: Compute capability, as 90 for 9.0.
        name: As the driver gives it; empty for a device that is not at hand.
    """

    capability: int
    name: str = ""

    @property
    def shared_bytes(self) -> int:
        """Most shared memory of one program."""
        return SHARED_BYTES.get(self.capability, 99 * 1024)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What decides a configuration: constants of the model, so that a row's result does not depend on the batch.

    Attributes:
        op: Name of the semantic op.
        dtype: `float16` or `bfloat16`; `float32` under the interpreter.
        sizes: Named sizes that are constants of a model, such as E, P or D.
        rows: Bucket of the number of rows; None where batch invariance forbids to look at it.
    """

    op: str
    dtype: str
    sizes: tuple[tuple[str, int], ...]
    rows: int | None = None

    @property
    def key(self) -> str:
        """The problem's name in a tuned table."""
        parts = [f"{name}={value}" for name, value in self.sizes]
        return ",".join(parts if self.rows is None else [*parts, f"rows={self.rows}"])

    def __getitem__(self, name: str) -> int:
        return dict(self.sizes)[name]


def bucket(rows: int) -> int:
    """The least power of two that holds so many rows, from 16 to 65,536: 13 buckets."""
    return min(1 << 16, max(16, 1 << (rows - 1).bit_length()))
