"""ONNX Runtime on CPU. The graphs share one copy of the weights: the bytes of the bundle that were hashed."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onetrans.errors import BundleError, MissingDependencyError
from onetrans.features.encode import TensorSpec
from onetrans.runtime.backends.base import Arrays, Backend, State
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.manifest import WEIGHTS_FILE, Graph
from onetrans.runtime.tensors import read_tensors


def import_onnxruntime() -> ModuleType:
    """ONNX Runtime.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            'this bundle needs ONNX Runtime, which is not installed: pip install "onetrans-export[serve]"'
        ) from error
    module: ModuleType = onnxruntime
    return module


class OnnxRuntimeCpu(Backend):
    """Sessions for prefill, append and decode; states are OrtValues that go from one to the next uncopied."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.ort = import_onnxruntime()
        self._weights = {
            name: self.ort.OrtValue.ortvalue_from_numpy(view)
            for name, view in read_tensors(bundle.contents[WEIGHTS_FILE], WEIGHTS_FILE).items()
        }
        self._sessions = {name: self._session(graph, threads) for name, graph in self.manifest.graphs.items()}

    def _session(self, graph: Graph, threads: int | None) -> Any:
        options = self.ort.SessionOptions()
        options.log_severity_level = 3
        # Idle threads of one graph would spin on against the next one: 6.4 instead of 3.1 ms, decode of tiny, 2 cores.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            options.add_external_initializers(list(graph.weights), [self._weights[name] for name in graph.weights])
            return self.ort.InferenceSession(
                self.bundle.contents[graph.file], options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime raises several types of its own
            raise BundleError(f"ONNX Runtime {self.ort.__version__} cannot load {graph.file}: {error}") from error

    def prefill(self, inputs: Arrays) -> State:
        """See `Backend.prefill`."""
        return self._new_state("prefill", inputs, {})

    def append(self, state: State, inputs: Arrays) -> State:
        """See `Backend.append`."""
        if "append" not in self._sessions:
            raise BundleError(
                f"{self.bundle.path} has no append graph: its {self.manifest.merge} merge always prefills"
            )
        past = {f"past_{name}": value for name, value in state.tensors.items()}
        grown = self._new_state("append", inputs, past)
        old_lengths, new_lengths = state.tensors["lengths"].numpy(), grown.tensors["lengths"].numpy()
        tensors = dict(grown.tensors)
        for tensor in self.manifest.state:
            if tensor.window is not None:
                name, layer = tensor.spec.name, tensor.window
                joined = _join(
                    state.tensors[name].numpy(),
                    tensors[name].numpy(),
                    old_lengths[:, layer],
                    new_lengths[:, layer],
                )
                tensors[name] = self.ort.OrtValue.ortvalue_from_numpy(joined)
        return State(tensors, grown.user_inputs, grown.length)

    def decode(self, state: State, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        """See `Backend.decode`."""
        alone = all(value.shape[:2] == (1, 1) for value in inputs.values())
        if alone:
            # A single row takes another kernel, which sums in another order (off by up to 20 ulp of the logit): score
            # it twice, so that a candidate's score does not depend on its company.
            inputs = {name: np.repeat(value, 2, axis=1) for name, value in inputs.items()}
        values = self._run("decode", {**state.user_inputs, **inputs}, state.tensors)
        return {task: value.numpy()[:, : 1 if alone else None] for task, value in values.items()}

    def state_arrays(self, state: State) -> dict[str, NDArray[Any]]:
        """See `Backend.state_arrays`."""
        return {name: np.array(value.numpy()) for name, value in state.tensors.items()}

    def _new_state(self, graph: str, inputs: Arrays, past: Arrays) -> State:
        tensors = self._run(graph, inputs, past)
        read_by_decode = {spec.name for spec in self.manifest.graphs["decode"].inputs}
        kept = {name: value for name, value in inputs.items() if name in read_by_decode}
        return State(tensors, kept, inputs["history_start"] + inputs["history_length"])

    def _run(self, name: str, arrays: Arrays, values: Arrays) -> dict[str, Any]:
        graph = self.manifest.graphs[name]
        binding = self._sessions[name].io_binding()
        for spec in graph.inputs:
            if spec.name in values:
                binding.bind_ortvalue_input(spec.name, values[spec.name])
            else:
                binding.bind_cpu_input(spec.name, np.ascontiguousarray(arrays[spec.name]))
        for spec in graph.outputs:
            binding.bind_output(spec.name)
        self._sessions[name].run_with_iobinding(binding)
        return dict(zip(_names(graph.outputs), binding.get_outputs(), strict=True))


def _names(specs: Sequence[TensorSpec]) -> list[str]:
    return [spec.name for spec in specs]


def _join(
    past: NDArray[Any], new: NDArray[Any], past_length: NDArray[np.int64], length: NDArray[np.int64]
) -> NDArray[Any]:
    """Windows [U, W, H, E] of `past` rows followed by `new` rows, left-aligned per user; total lengths [U]."""
    U, _, H, E = past.shape
    joined = np.zeros((U, max(1, int(length.max())), H, E), past.dtype)
    for u in range(U):
        before, total = int(past_length[u]), int(length[u])
        joined[u, :before] = past[u, :before]
        joined[u, before:total] = new[u, : total - before]
    return joined
