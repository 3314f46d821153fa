"""Predictions before measuring: operations over the machine's rate, bytes over its bandwidth."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.floor import Floor
from benchmarks.products import BYTES, Product
from onetrans.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the machine gives at best: float32 operations, and bytes read or written, per second."""

    flops: float
    bandwidth: float

    def __str__(self) -> str:
        return f"{self.flops / 1e9:.0f} GFLOP/s, {self.bandwidth / 1e9:.1f} GB/s"


def measure_machine(threads: int) -> Machine:
    """The best of several passes of one 1024³ MatMul in ONNX Runtime, and of one copy that no cache holds."""
    cube = Product(name="cube", batch=1, rows=1024, inner=1024, columns=1024, weight=True)
    floor = Floor([cube], threads=threads)
    fastest = min(floor.run() for _ in range(12))
    source = np.ones(64 << 20, np.float32)
    target = np.empty_like(source)
    copies = []
    for _ in range(4):
        began = time.perf_counter()
        np.copyto(target, source)
        copies.append(time.perf_counter() - began)
    return Machine(flops=cube.flops / fastest, bandwidth=2 * source.nbytes / min(copies))


def floor_seconds(products: Sequence[Product], machine: Machine) -> float:
    """Each product is bound by arithmetic or by bandwidth, whichever takes longer."""
    return sum(max(product.flops / machine.flops, product.bytes / machine.bandwidth) for product in products)


def decode_pointwise_bytes(config: ModelConfig, *, lengths: Sequence[int], candidates: int) -> int:
    """Bytes that decode moves between its products, each step reading and writing once.

    Per layer and token, in widths of d: two norms 4, the cut of QKV and its head-major form 12, the head-major result
    back 2, two residuals 6, the activation 2 × ratio; per score: joining, masking and softmax, 6 in all.
    """
    tokens = config.l_ns * candidates
    wide = (4 + 12 + 2 + 6 + 2 * config.ffn_ratio) * config.d * tokens
    scores = sum(6 * config.heads * tokens * (window + config.l_ns) for window in lengths)
    return BYTES * (wide * len(lengths) + scores)


def prefill_pointwise_bytes(config: ModelConfig, *, lengths: Sequence[int]) -> int:
    """Bytes that prefill moves between its products.

    Per layer, in widths of d: a window's token: norm 2, cut of KV 4, head-major form 4; a queried token: its
    selection 2, two norms 4, head-major form and back 4, two residuals 6, the activation 2 × ratio; per score: mask and
    softmax 4.
    """
    total = 0
    for layer, window in enumerate(lengths):
        total += 10 * config.d * window
        if layer + 1 < len(lengths):
            queries = lengths[layer + 1]
            total += (16 + 2 * config.ffn_ratio) * config.d * queries + 4 * config.heads * queries * window
    return BYTES * total
