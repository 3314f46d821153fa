"""Time of a bundle's graph node by node, from ONNX Runtime's profiler."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
from numpy.typing import NDArray

from onetrans.runtime.bundle import Bundle
from onetrans.runtime.manifest import WEIGHTS_FILE
from onetrans.runtime.tensors import read_tensors

WARMUP = 5


@dataclass(frozen=True)
class NodeTimes:
    """Seconds of each run's nodes: those with one of the given sizes in an input or output, and the others."""

    inside: list[float]
    outside: list[float]


def node_times(
    bundle: Bundle,
    name: str,
    inputs: Mapping[str, NDArray[Any]],
    *,
    threads: int,
    runs: int,
    sizes: Collection[int],
) -> NodeTimes:
    """Runs a graph with the profiler on.

    Args:
        bundle: An ONNX bundle.
        name: `prefill`, `append` or `decode`.
        inputs: By name; more than the graph takes may be given.
        threads: Of ONNX Runtime.
        runs: Measured ones; WARMUP go before.
        sizes: What marks a node as inside.
    """
    graph = bundle.manifest.graphs[name]
    weights = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(value)
        for name, value in read_tensors(bundle.contents[WEIGHTS_FILE], WEIGHTS_FILE).items()
    }
    with tempfile.TemporaryDirectory(prefix="onetrans-profile-") as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "nodes")
        options.add_external_initializers(list(graph.weights), [weights[weight] for weight in graph.weights])
        session = onnxruntime.InferenceSession(bundle.contents[graph.file], options, providers=["CPUExecutionProvider"])
        given = {spec.name: inputs[spec.name] for spec in graph.inputs}
        for _ in range(WARMUP + runs):
            session.run(None, given)
        events = json.loads(Path(session.end_profiling()).read_text())
    inside, outside = [], []
    for event in events:
        if event["name"] == "model_run":  # stands behind its nodes
            inside.append(0.0)
            outside.append(0.0)
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        run = sum(start <= event["ts"] for start in starts) - 1
        shapes = [event["args"].get(side) or [] for side in ("input_type_shape", "output_type_shape")]
        dims = {size for side in shapes for value in side for shape in value.values() for size in shape}
        (inside if dims & set(sizes) else outside)[run] += event["dur"] / 1e6
    return NodeTimes(inside[WARMUP:], outside[WARMUP:])
