"""ONNX Runtime on CPU. The graphs share one copy of the weights: the bytes of the bundle that were hashed."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onetrans.errors import BundleError, MissingDependencyError
from onetrans.runtime.backends.base import Arrays, Backend, StatePool
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.manifest import WEIGHTS_FILE, Graph
from onetrans.runtime.pools.host import HostPool
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
    """Sessions for prefill, append and decode over slabs in host memory.

    One user's graphs read and write the slabs themselves. Several users are padded together: decode of 4 users with 10
    candidates each takes half the time of 4 decodes (OneTrans-S), since weights are read once; but only users whose
    windows, and whose new events or candidates, are within a factor of two, so that padding costs less than it saves.
    """

    device = "cpu"

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.dtype = bundle.manifest.precision
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

    def allocate(self, slots: int) -> HostPool:
        """See `Backend.allocate`."""
        return HostPool(self.manifest, slots)

    def prefill(self, pool: StatePool, slots: Sequence[int], inputs: Arrays) -> None:
        """See `Backend.prefill`."""
        assert isinstance(pool, HostPool)
        for users in alike(inputs["history_length"]):
            part = _of_users(inputs, users)
            into = [slots[u] for u in users]
            if len(users) == 1:
                self._run_into("prefill", part, pool.fresh(into[0], part["event_behaviour"].shape[1]))
            else:
                nothing = np.zeros((len(users), len(self.manifest.windows.keep)), np.int64)
                pool.store(into, self._run("prefill", part), nothing)

    def append(self, pool: StatePool, slots: Sequence[int], inputs: Arrays) -> None:
        """See `Backend.append`."""
        assert isinstance(pool, HostPool)
        if "append" not in self._sessions:
            raise BundleError(
                f"{self.bundle.path} has no append graph: its {self.manifest.merge} merge always prefills"
            )
        made = []
        for users in alike(inputs["history_length"], _windows(pool, slots)):
            part = _of_users(inputs, users)
            into = [slots[u] for u in users]
            past = pool.gather([name.removeprefix("past_") for name in self._reads("append", "past_")], into)
            grown = self._run("append", {**part, **{f"past_{name}": value for name, value in past.items()}})
            made.append((into, grown, np.stack([pool.lengths(slot) for slot in into])))
        for into, grown, held in made:
            pool.store(into, grown, held)

    def decode(
        self, pool: StatePool, slots: Sequence[int], inputs: Arrays, counts: NDArray[np.int64]
    ) -> dict[str, NDArray[np.float32]]:
        """See `Backend.decode`."""
        assert isinstance(pool, HostPool)
        U, C = len(counts), int(counts.max())
        logits = {task: np.zeros((U, C), np.float32) for task in self.manifest.tasks}
        for users in alike(counts, _windows(pool, slots)):
            most = int(counts[users].max())
            own = {
                name: value[users][:, :most] if name.startswith("candidate_") else value[users]
                for name, value in inputs.items()
            }
            if len(users) == most == 1:
                # A single row takes another kernel, which sums in another order (off by up to 20 ulp of the logit):
                # score it twice, so that a candidate's score does not depend on its company.
                own = {n: np.repeat(v, 2, axis=1) if n.startswith("candidate_") else v for n, v in own.items()}
            into = [slots[u] for u in users]
            state = pool.gather([name for name in self._reads("decode") if name in pool.tensors], into)
            made = self._run("decode", {**own, **state})
            for task, value in made.items():
                logits[task][users, :most] = value[:, :most]
        return logits

    def _reads(self, name: str, prefix: str = "") -> list[str]:
        """Inputs of a graph whose names begin so."""
        return [spec.name for spec in self.manifest.graphs[name].inputs if spec.name.startswith(prefix)]

    def _run(self, name: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Runs a graph; contiguous inputs are read where they are."""
        graph = self.manifest.graphs[name]
        values = self._sessions[name].run(None, {spec.name: inputs[spec.name] for spec in graph.inputs})
        return {spec.name: value for spec, value in zip(graph.outputs, values, strict=True)}

    def _run_into(self, name: str, inputs: Arrays, outputs: Arrays) -> None:
        """Runs a graph that writes its results into `outputs`."""
        graph = self.manifest.graphs[name]
        binding = self._sessions[name].io_binding()
        kept = [np.ascontiguousarray(inputs[spec.name]) for spec in graph.inputs]  # read by address
        for spec, value in zip(graph.inputs, kept, strict=True):
            binding.bind_input(spec.name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
        for spec in graph.outputs:
            value = outputs[spec.name]
            assert value.flags.c_contiguous
            binding.bind_output(spec.name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
        self._sessions[name].run_with_iobinding(binding)


def alike(*sizes: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Users in groups whose sizes, of each kind, are within a factor of two of their group's largest."""
    groups = [np.arange(len(sizes[0]))]
    for kind in sizes:
        groups = [part for group in groups for part in _alike(group, kind)]
    return groups


def _alike(users: NDArray[np.int64], sizes: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    groups: list[list[int]] = []
    for user in users[np.argsort(-sizes[users], kind="stable")]:
        if groups and 2 * sizes[user] >= sizes[groups[-1][0]]:
            groups[-1].append(int(user))
        else:
            groups.append([int(user)])
    return [np.sort(np.array(group, dtype=np.int64)) for group in groups]


def _windows(pool: HostPool, slots: Sequence[int]) -> NDArray[np.int64]:
    """Tokens of each user's first window, the widest [U]."""
    return np.array([pool.lengths(slot)[0] for slot in slots], dtype=np.int64)


def _of_users(inputs: Arrays, users: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """The inputs of some users, their events cut to the longest of them."""
    longest = max(1, int(inputs["history_length"][users].max()))
    return {
        name: value[users][:, :longest] if name.startswith("event_") else value[users] for name, value in inputs.items()
    }
