"""Operations and bytes of kernels and programs, their floors on a device, and predictions made before measuring.

Bytes count each input read once and each output written once; operations are multiplications and additions, causal
attention's over visible pairs alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.products import Product, decode_products, prefill_products, visible_pairs
from onetrans.features.windows import window_starts
from onetrans.model.config import ModelConfig

HALF = 2  # bytes of float16 and bfloat16
BANDWIDTH_SHARE = 0.8  # of the copy's rate that a kernel is predicted to reach
MATMUL_SHARE = 0.5  # of the large product's rate, likewise
LAUNCH = 2e-6  # seconds that a kernel in a graph is predicted to take beyond its work


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a computation cannot do without.

    Attributes:
        flops: Operations.
        bytes: Read and written.
        weight_bytes: The part of `bytes` that is weights.
        parts: Operations and bytes of each kernel, where there are several.
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
class Ceilings:
    """What a device gives at best: bytes moved per second, operations per second by dtype, seconds of a launch."""

    copy: float
    matmul: dict[str, float]
    launch: float

    def floor(self, work: Work, dtype: str) -> float:
        """Seconds below which no version runs: all bytes at the copy's rate, or all operations at the product's."""
        return max(work.bytes / self.copy, work.flops / self.matmul[dtype])

    def weight_floor(self, work: Work, dtype: str) -> float:
        """Seconds: the larger of weight bytes at the copy's rate and operations at the product's."""
        return max(work.weight_bytes / self.copy, work.flops / self.matmul[dtype])

    def predict(self, work: Work, dtype: str, launches: int | None = None) -> float:
        """Seconds that a good implementation is predicted to take, kernel by kernel."""
        copy, matmul = BANDWIDTH_SHARE * self.copy, MATMUL_SHARE * self.matmul[dtype]
        busy = sum(max(moved / copy, flops / matmul) for flops, moved in work.each)
        return busy + LAUNCH * (len(work.each) if launches is None else launches)


PREDICTION = (
    f"each kernel max(bytes / ({BANDWIDTH_SHARE} copy rate), flops / ({MATMUL_SHARE} matmul rate)), and"
    f" {1e6 * LAUNCH:.0f} µs a launch"
)


def history_work(*, queries: int, window: int, heads: int, width: int) -> Work:
    """history_attention of the last `queries` of `window` tokens, heads of `width`."""
    flops = 4 * heads * width * visible_pairs(queries, window)
    return Work(flops=flops, bytes=HALF * heads * width * 2 * (queries + window))


def candidate_work(*, candidates: int, positions: int, window: int, heads: int, width: int) -> Work:
    """candidate_attention of one user's candidates over a window and their own causal blocks."""
    pairs = positions * window + positions * (positions + 1) // 2
    rows = positions * candidates
    return Work(flops=4 * heads * width * candidates * pairs, bytes=HALF * heads * width * (4 * rows + 2 * window))


def linear_work(*, positions: int, rows: int, inner: int, columns: int, gain: bool, residual: bool) -> Work:
    """mixed_linear."""
    weights = positions * inner * columns + (inner if gain else 0)
    moved = positions * rows * (inner + columns * (2 if residual else 1))
    return Work(
        flops=2 * positions * rows * inner * columns, bytes=HALF * (moved + weights), weight_bytes=HALF * weights
    )


def ffn_work(*, positions: int, rows: int, inner: int, hidden: int) -> Work:
    """mixed_ffn without a gate, its hidden columns never in device memory."""
    weights = 2 * positions * inner * hidden + inner
    return Work(
        flops=4 * positions * rows * inner * hidden,
        bytes=HALF * (2 * positions * rows * inner + weights),
        weight_bytes=HALF * weights,
    )


def windows(config: ModelConfig, length: int) -> list[int]:
    """Tokens of each layer's window for a history of `length` events."""
    starts = window_starts(length, max_history=config.max_history, keep=config.keep, chunk=config.append_chunk)
    return [length - start for start in starts[:-1]]


def prefill_work(config: ModelConfig, length: int) -> Work:
    """A fresh prefill of one user."""
    return _of_products(prefill_products(config, lengths=windows(config, length), visible_only=True))


def decode_work(config: ModelConfig, length: int, candidates: int) -> Work:
    """Decode of one user's candidates."""
    return _of_products(decode_products(config, lengths=windows(config, length), candidates=candidates))


def append_work(config: ModelConfig, before: int, new: int) -> Work:
    """An exact append of `new` events to `before`."""
    d, H, wide = config.d, config.heads, sum(feature.embedded_dim for feature in config.schema.event)
    hidden = config.ffn_ratio * d

    def product(name: str, inner: int, columns: int) -> Product:
        return Product(name=name, batch=1, rows=new, inner=inner, columns=columns, weight=True)

    user = sum(feature.embedded_dim for feature in config.schema.user)
    found = [
        Product(name="user features", batch=1, rows=1, inner=user, columns=config.tokenizer_hidden, weight=True),
        product("event up", wide, config.event_hidden),
        product("event down", config.event_hidden, d),
    ]
    total = before + new
    for layer, window in enumerate(windows(config, total)):
        found.append(product(f"{layer} kv", d, 2 * d))
        if layer + 1 < config.layers:
            seen = round(visible_pairs(new, window) / new)
            found += [
                product(f"{layer} q", d, d),
                Product(name="scores", batch=H, rows=new, inner=config.head_dim, columns=seen, weight=False),
                Product(name="values", batch=H, rows=new, inner=seen, columns=config.head_dim, weight=False),
                product(f"{layer} o", d, d),
                product(f"{layer} up", d, hidden),
                product(f"{layer} down", hidden, d),
            ]
    return _of_products(found)


def _of_products(products: Sequence[Product]) -> Work:
    """Activations between products stay on the chip: bytes are those of weights, and of K and V once."""
    parts = []
    for product in products:
        batch, inner, columns = product.right
        parts.append((product.flops, HALF * batch * inner * columns))
    weights = sum(moved for product, (_, moved) in zip(products, parts, strict=True) if product.weight)
    return Work(
        flops=sum(flops for flops, _ in parts),
        bytes=sum(moved for _, moved in parts),
        weight_bytes=weights,
        parts=tuple(parts),
    )
