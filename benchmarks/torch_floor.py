"""The floor's products by PyTorch, as a cross-check of ONNX Runtime's MatMul.

`python -m benchmarks.torch_floor` reads {"products", "threads", "rounds"} on stdin and prints {"seconds"}. It runs in a
process of its own, because the threads of one library spin while the other computes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.products import Product
from onetrans.bench.run import quiet_collector


def time_products(products: Sequence[Product], *, threads: int, rounds: int, warmup: int = 2) -> list[float]:
    """Seconds of each pass over all products, float32; results of one shape share a buffer unless they are chained."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    chained = {product.after for product in products}
    results: dict[str, torch.Tensor] = {}
    buffers: dict[tuple[int, ...], torch.Tensor] = {}
    work = []
    for product in products:
        shape = (product.batch, product.rows, product.columns)
        fresh = product.name in chained or shape not in buffers
        result = torch.empty(shape) if fresh else buffers[shape]
        if product.name not in chained:
            buffers[shape] = result
        results[product.name] = result
        left = results[product.after] if product.after else torch.randn(product.left) * product.inner**-0.5
        work.append((left, torch.randn(product.right) * product.inner**-0.5, result))
    seconds = []
    with torch.inference_mode(), quiet_collector():
        for index in range(warmup + rounds):
            began = time.perf_counter()
            for left, right, result in work:
                torch.bmm(left, right, out=result)
            if index >= warmup:
                seconds.append(time.perf_counter() - began)
    return seconds


def main() -> None:
    """Reads stdin, prints JSON."""
    asked = json.load(sys.stdin)
    products = [Product(**product) for product in asked["products"]]
    print(json.dumps({"seconds": time_products(products, threads=asked["threads"], rounds=asked["rounds"])}))


if __name__ == "__main__":
    main()
