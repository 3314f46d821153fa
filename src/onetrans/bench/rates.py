"""Bytes over bandwidth and operations over rate: what a computation cannot do without, its floor, its prediction.

Bytes count each operand read once and each result written once; operations are multiplications and additions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from onetrans.precision import BY_NAME

HALF = 2  # bytes of float16 and bfloat16
BANDWIDTH_SHARE = 0.8  # of the copy's rate that a kernel is predicted to reach
MATMUL_SHARE = 0.5  # of the large product's rate, likewise
LAUNCH = 2e-6  # seconds that a kernel in a graph is predicted to take beyond its work
PREDICTION = (
    f"each kernel max(bytes / ({BANDWIDTH_SHARE} copy rate), flops / ({MATMUL_SHARE} matmul rate)), and"
    f" {1e6 * LAUNCH:.0f} µs a launch"
)


@dataclass(frozen=True, kw_only=True)
class Product:
    """`batch` products [rows, inner] @ [inner, columns].

    Attributes:
        weight: Whether the right side is a constant of the model; otherwise it is an activation or part of the state.
        after: Name of the product whose result is the left side, where nothing but pointwise work lies between.
    """

    name: str
    rows: int
    inner: int
    columns: int
    batch: int = 1
    weight: bool = True
    after: str | None = None

    @property
    def left(self) -> tuple[int, int, int]:
        """Shape of the left side."""
        return self.batch, self.rows, self.inner

    @property
    def right(self) -> tuple[int, int, int]:
        """Shape of the right side."""
        return self.batch, self.inner, self.columns

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.batch * self.rows * self.inner * self.columns

    @property
    def right_values(self) -> int:
        """Numbers of the right side."""
        return self.batch * self.inner * self.columns

    @property
    def values(self) -> int:
        """Numbers of both sides and of the result."""
        return self.right_values + self.batch * self.rows * (self.inner + self.columns)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a computation cannot do without; `parts` are operations and bytes of each kernel, where there are several.

    Attributes:
        weight_bytes: The part of `bytes` that is weights.
    """

    flops: int
    bytes: int
    weight_bytes: int = 0
    parts: tuple[tuple[int, int], ...] = ()

    def __add__(self, other: Work) -> Work:
        return Work(
            flops=self.flops + other.flops,
            bytes=self.bytes + other.bytes,
            weight_bytes=self.weight_bytes + other.weight_bytes,
            parts=self.each + other.each,
        )

    @property
    def each(self) -> tuple[tuple[int, int], ...]:
        """Operations and bytes of each kernel."""
        return self.parts or ((self.flops, self.bytes),)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device gives at best: bytes copied a second, operations a second by dtype, seconds of a launch."""

    copy: float
    matmul: Mapping[str, float]
    launch: float = 0.0

    def floor(self, work: Work, dtype: str) -> float:
        """Seconds below which no version runs: all bytes at the copy's rate, or all operations at the product's."""
        return max(work.bytes / self.copy, work.flops / self.matmul[dtype])

    def weight_floor(self, work: Work, dtype: str) -> float:
        """Seconds: the larger of weight bytes at the copy's rate and operations at the product's."""
        return max(work.weight_bytes / self.copy, work.flops / self.matmul[dtype])

    def in_sequence(self, work: Work, dtype: str = "float32") -> float:
        """Seconds of the parts one after another, each bound by arithmetic or by bandwidth, whichever takes longer."""
        return sum(max(moved / self.copy, flops / self.matmul[dtype]) for flops, moved in work.each)

    def predict(self, work: Work, dtype: str, launches: int | None = None) -> float:
        """Seconds that a good implementation is predicted to take, kernel by kernel; one launch each if left out."""
        copy, matmul = BANDWIDTH_SHARE * self.copy, MATMUL_SHARE * self.matmul[dtype]
        busy = sum(max(moved / copy, flops / matmul) for flops, moved in work.each)
        return busy + LAUNCH * (len(work.each) if launches is None else launches)


def work_of(products: Iterable[Product], dtype: str, *, activations: bool = False) -> Work:
    """The products' work, each a part.

    Args:
        products: What is computed.
        dtype: Dtype of all operands.
        activations: Count what lies between products as read and written; else it stays on the chip, and bytes are
            those of weights, and of K and V once.
    """
    nbytes, products = BY_NAME[dtype].nbytes, list(products)  # type: ignore[index]
    parts = tuple((p.flops, nbytes * (p.values if activations else p.right_values)) for p in products)
    return Work(
        flops=sum(flops for flops, _ in parts),
        bytes=sum(moved for _, moved in parts),
        weight_bytes=nbytes * sum(p.right_values for p in products if p.weight),
        parts=parts,
    )


def visible_pairs(queries: int, window: int) -> int:
    """Pairs of the last `queries` tokens of a window and the tokens that each sees, itself included."""
    first = window - queries + 1
    return queries * (first + window) // 2


def history_work(*, queries: int, window: int, heads: int, width: int) -> Work:
    """history_attention of the last `queries` of `window` tokens, heads of `width`, over visible pairs."""
    flops = 4 * heads * width * visible_pairs(queries, window)
    return Work(flops=flops, bytes=HALF * heads * width * 2 * (queries + window))


def candidate_work(*, candidates: int, positions: int, window: int, heads: int, width: int) -> Work:
    """candidate_attention of one user's candidates over a window and their own causal blocks."""
    pairs = positions * window + positions * (positions + 1) // 2
    moved = 4 * positions * candidates + 2 * window
    return Work(flops=4 * heads * width * candidates * pairs, bytes=HALF * heads * width * moved)


def linear_work(*, positions: int, rows: int, inner: int, columns: int, gain: bool, residual: bool) -> Work:
    """mixed_linear."""
    weights = positions * inner * columns + (inner if gain else 0)
    moved = positions * rows * (inner + columns * (2 if residual else 1))
    flops = 2 * positions * rows * inner * columns
    return Work(flops=flops, bytes=HALF * (moved + weights), weight_bytes=HALF * weights)


def ffn_work(*, positions: int, rows: int, inner: int, hidden: int) -> Work:
    """mixed_ffn without a gate, its hidden columns never in device memory."""
    weights = 2 * positions * inner * hidden + inner
    moved = 2 * positions * rows * inner + weights
    flops = 4 * positions * rows * inner * hidden
    return Work(flops=flops, bytes=HALF * moved, weight_bytes=HALF * weights)
