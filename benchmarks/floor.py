"""The floor: an ONNX graph of nothing but the needed MatMuls, in the same ONNX Runtime with the same threads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks.products import Product

OPSET = 23


def floor_model(products: Sequence[Product], *, seed: int = 0) -> bytes:
    """One MatMul per product; `after` chains two of them, every other left side is an input.

    Weights are initializers, as in a bundle: a single set is a plain matrix, which ONNX Runtime packs at load.
    """
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
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")  # as the backend does
        self._session = onnxruntime.InferenceSession(
            floor_model(products, seed=seed), options, providers=["CPUExecutionProvider"]
        )
        rng = np.random.default_rng(seed + 1)
        self._binding = self._session.io_binding()
        self._held: list[Any] = []
        for value in self._session.get_inputs():
            self._binding.bind_ortvalue_input(value.name, self._hold(_values(rng, tuple(value.shape))))
        buffers: dict[tuple[int, ...], Any] = {}
        for value in self._session.get_outputs():
            shape = tuple(value.shape)
            if shape not in buffers:
                buffers[shape] = self._hold(np.zeros(shape, np.float32))
            self._binding.bind_ortvalue_output(value.name, buffers[shape])

    def _hold(self, array: NDArray[np.float32]) -> Any:
        self._held.append(onnxruntime.OrtValue.ortvalue_from_numpy(array))
        return self._held[-1]

    def run(self) -> float:
        """Seconds of one pass."""
        began = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        return time.perf_counter() - began


def _values(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Normal numbers over the root of the inner size, so that chained products neither overflow nor vanish."""
    values: NDArray[np.float32] = rng.standard_normal(shape, np.float32) * np.float32(shape[-2] ** -0.5)
    return values
