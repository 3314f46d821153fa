"""Operations of the products in a bundle's graph as it runs, padding and all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from onetrans.runtime.bundle import Bundle
from onetrans.runtime.manifest import WEIGHTS_FILE
from onetrans.runtime.tensors import read_tensors


def graph_flops(bundle: Bundle, name: str, inputs: Mapping[str, NDArray[Any]]) -> int:
    """Multiplications and additions of every MatMul, and of Attention's two products over all pairs.

    Runs the graph once, unoptimised, with the products' operands as further outputs, and reads their shapes.

    Args:
        bundle: An ONNX bundle.
        name: `prefill`, `append` or `decode`.
        inputs: By name, as the graph takes them.
    """
    graph = bundle.manifest.graphs[name]
    model = onnx.load_model_from_string(bundle.contents[graph.file])
    operands = [node for node in model.graph.node if node.op_type in ("MatMul", "Attention")]
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    have = {value.name for value in (*model.graph.output, *model.graph.input)} | set(weights)
    for node in operands:
        for value in (*node.input[:2], node.output[0]):
            if value not in have:
                model.graph.output.append(helper.make_empty_tensor_value_info(value))
                have.add(value)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    stored = read_tensors(bundle.contents[WEIGHTS_FILE], WEIGHTS_FILE)
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(stored[weight]) for weight in graph.weights]
    options.add_external_initializers(list(graph.weights), values)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    shapes = {key: value.shape for key, value in zip(names, session.run(names, dict(inputs)), strict=True)}
    shapes |= {key: np.shape(value) for key, value in inputs.items()} | weights
    total = 0
    for node in operands:
        left, right, result = (shapes[value] for value in (*node.input[:2], node.output[0]))
        if node.op_type == "MatMul":
            total += 2 * int(np.prod(result)) * left[-1]
        else:
            total += 2 * 2 * int(np.prod(left)) * right[-2]
    return total
