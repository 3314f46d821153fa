"""The floor on a CPU: nothing but the needed MatMuls, in ONNX Runtime, and by PyTorch as a cross-check.

`python -m onetrans.bench.floor` reads {"products", "threads", "rounds"} on stdin and prints {"seconds"} of
PyTorch: in a process of its own, because the threads of one library spin while the other computes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onetrans.bench.rates import Product, Rates
from onetrans.bench.run import quiet_collector

OPSET = 23


def new_session(model: bytes | str, threads: int) -> Any:
    """A session with the options of our backend."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # as the backend does
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def floor_model(products: Sequence[Product], *, seed: int = 0) -> bytes:
    """One MatMul per product; `after` chains two of them, every other left side is an input.

    Weights are initializers, as in a bundle: a single set is a plain matrix, which ONNX Runtime packs at load.
    """
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    nodes, inputs, outputs, weights = [], [], [], []
    chained = {product.after for product in products}
    for product in products:
        left, right = product.after, f"{product.name} b"
        if left is None:
            left = f"{product.name} a"
            inputs.append(helper.make_tensor_value_info(left, TensorProto.FLOAT, product.left))
        shape = product.right[1:] if product.weight and product.batch == 1 else product.right
        if product.weight:
            weights.append(numpy_helper.from_array(_values(rng, shape), right))
        else:
            inputs.append(helper.make_tensor_value_info(right, TensorProto.FLOAT, shape))
        nodes.append(helper.make_node("MatMul", [left, right], [product.name]))
        if product.name not in chained:
            shape = (product.batch, product.rows, product.columns)
            outputs.append(helper.make_tensor_value_info(product.name, TensorProto.FLOAT, shape))
    graph = helper.make_graph(nodes, "floor", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    content: bytes = model.SerializeToString()
    return content


class Floor:
    """A loaded floor. Results of one shape share one buffer, so that it has the least memory to walk."""

    def __init__(self, products: Sequence[Product], *, threads: int, seed: int = 0) -> None:
        self._session = new_session(floor_model(products, seed=seed), threads)
        rng = np.random.default_rng(seed + 1)
        self._binding = self._session.io_binding()
        self._kept: list[Any] = []
        for value in self._session.get_inputs():
            self._binding.bind_ortvalue_input(value.name, self._keep(_values(rng, tuple(value.shape))))
        buffers: dict[tuple[int, ...], Any] = {}
        for value in self._session.get_outputs():
            shape = tuple(value.shape)
            if shape not in buffers:
                buffers[shape] = self._keep(np.zeros(shape, np.float32))
            self._binding.bind_ortvalue_output(value.name, buffers[shape])

    def _keep(self, array: NDArray[np.float32]) -> Any:
        import onnxruntime

        self._kept.append(onnxruntime.OrtValue.ortvalue_from_numpy(array))
        return self._kept[-1]

    def run(self) -> float:
        """Seconds of one run of all products."""
        began = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        return time.perf_counter() - began


def measure_cpu(threads: int) -> Rates:
    """The best of several runs of one 1024³ MatMul in ONNX Runtime, and of one copy that no cache holds."""
    cube = Product(name="cube", rows=1024, inner=1024, columns=1024)
    floor = Floor([cube], threads=threads)
    fastest = min(floor.run() for _ in range(12))
    source = np.ones(64 << 20, np.float32)
    target = np.empty_like(source)
    copies = []
    for _ in range(4):
        began = time.perf_counter()
        np.copyto(target, source)
        copies.append(time.perf_counter() - began)
    return Rates(copy=2 * source.nbytes / min(copies), matmul={"float32": cube.flops / fastest})


def _values(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Normal numbers over the root of the inner size, so that chained products neither overflow nor vanish."""
    values: NDArray[np.float32] = rng.standard_normal(shape, np.float32) * np.float32(shape[-2] ** -0.5)
    return values


def time_products(products: Sequence[Product], *, threads: int, rounds: int, warmup: int = 2) -> list[float]:
    """PyTorch's seconds of each run of all products; results of one shape share a buffer unless they are chained."""
    import torch

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


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    given = [Product(**product) for product in asked["products"]]
    print(json.dumps({"seconds": time_products(given, threads=asked["threads"], rounds=asked["rounds"])}))
