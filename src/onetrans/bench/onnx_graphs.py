"""A bundle's ONNX graphs taken apart: the operations that they do, and the time of each node."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from onetrans.runtime.bundle import Bundle
from onetrans.runtime.manifest import WEIGHTS_FILE
from onetrans.runtime.tensors import read_tensors

WARMUP = 5
Arrays = Mapping[str, NDArray[Any]]


def _session(bundle: Bundle, name: str, model: bytes, options: Any) -> Any:
    """A session of one of the bundle's graphs, changed or not, over the bundle's weights."""
    stored = read_tensors(bundle.contents[WEIGHTS_FILE], WEIGHTS_FILE)
    weights = list(bundle.manifest.graphs[name].weights)
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(stored[weight]) for weight in weights]
    options.log_severity_level = 3
    options.add_external_initializers(weights, values)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def graph_flops(bundle: Bundle, name: str, inputs: Arrays) -> int:
    """Multiplications and additions of every MatMul, and of Attention's two products over all pairs, padding and all.

    Runs the graph once, unoptimised, with the products' operands as further outputs, and reads their shapes.
    """
    model = onnx.load_model_from_string(bundle.contents[bundle.manifest.graphs[name].file])
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
    session = _session(bundle, name, model.SerializeToString(), options)
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


def node_times(
    bundle: Bundle, name: str, inputs: Arrays, *, threads: int, runs: int, sizes: Collection[int]
) -> tuple[list[float], list[float]]:
    """Seconds of each run's nodes by ONNX Runtime's profiler: those with one of `sizes` in a shape, and the others."""
    graph, options = bundle.manifest.graphs[name], onnxruntime.SessionOptions()
    with tempfile.TemporaryDirectory(prefix="onetrans-profile-") as folder:
        options.intra_op_num_threads = threads
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "nodes")
        session = _session(bundle, name, bundle.contents[graph.file], options)
        given = {spec.name: inputs[spec.name] for spec in graph.inputs}
        for _ in range(WARMUP + runs):
            session.run(None, given)
        events = json.loads(Path(session.end_profiling()).read_text())
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")  # each stands behind its nodes
    inside, outside = [0.0] * len(starts), [0.0] * len(starts)
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        run = sum(start <= event["ts"] for start in starts) - 1
        shapes = [event["args"].get(side) or [] for side in ("input_type_shape", "output_type_shape")]
        dims = {size for side in shapes for value in side for shape in value.values() for size in shape}
        (inside if dims & set(sizes) else outside)[run] += event["dur"] / 1e6
    return inside[WARMUP:], outside[WARMUP:]
