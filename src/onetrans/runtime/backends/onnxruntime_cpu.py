"""ONNX Runtime on CPU. The graphs share one copy of the weights: the bytes of the bundle that were hashed."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onetrans.errors import BundleError, MissingDependencyError
from onetrans.runtime.backends.base import Backend, BackendOptions
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.manifest import WEIGHTS_FILE, Graph
from onetrans.runtime.pools.base import Arrays, StatePool
from onetrans.runtime.pools.host import HostPool
from onetrans.runtime.tensors import read_tensors
from onetrans.spec import TensorSpec


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

    def __init__(self, bundle: Bundle, options: BackendOptions | None = None) -> None:
        """See `Backend.__init__`."""
        options = options or BackendOptions()
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.dtype = bundle.manifest.precision
        self.ort = import_onnxruntime()
        self._weights = {
            name: self.ort.OrtValue.ortvalue_from_numpy(view)
            for name, view in read_tensors(bundle.contents[WEIGHTS_FILE], WEIGHTS_FILE).items()
        }
        self._sessions = {name: self._session(graph, options.threads) for name, graph in self.manifest.graphs.items()}

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
            part, tokens = self._of_users("prefill", inputs, users)
            into = [slots[u] for u in users]
            if len(users) == 1:
                self._run_into("prefill", part, pool.fresh(into[0], tokens))
            else:
                nothing = np.zeros((len(users), self.manifest.pyramid.layers), np.int64)
                pool.store(into, self._run("prefill", part), nothing)

    def append(self, pool: StatePool, slots: Sequence[int], inputs: Arrays) -> None:
        """See `Backend.append`."""
        assert isinstance(pool, HostPool)
        if "append" not in self._sessions:
            raise BundleError(
                f"{self.bundle.path} has no append graph: its {self.manifest.merge} merge always prefills"
            )
        made = []
        for users in alike(inputs["history_length"], _first_windows(pool, slots)):
            part, _ = self._of_users("append", inputs, users)
            into = [slots[u] for u in users]
            grown = self._run("append", {**part, **pool.gather(self._state_read("append"), into)})
            made.append((into, grown, np.stack([pool.lengths(slot) for slot in into])))
        for into, grown, kept in made:
            pool.store(into, grown, kept)

    def decode(
        self, pool: StatePool, slots: Sequence[int], inputs: Arrays, counts: NDArray[np.int64]
    ) -> dict[str, NDArray[np.float32]]:
        """See `Backend.decode`."""
        assert isinstance(pool, HostPool)
        U, C = len(counts), int(counts.max())
        logits = {task: np.zeros((U, C), np.float32) for task in self.manifest.tasks}
        for users in alike(counts, _first_windows(pool, slots)):
            most = int(counts[users].max())
            own = {
                spec.name: inputs[spec.name][users][:, :most] if spec.scope == "candidate" else inputs[spec.name][users]
                for spec in self.manifest.graphs["decode"].inputs
                if spec.state is None
            }
            if len(users) == most == 1:
                # A single row takes another kernel, which sums in another order (off by up to 20 ulp of the logit):
                # score it twice, so that a candidate's score does not depend on who else is scored.
                candidate = [spec.name for spec in self.manifest.graphs["decode"].inputs if spec.scope == "candidate"]
                own |= {name: np.repeat(own[name], 2, axis=1) for name in candidate}
            into = [slots[u] for u in users]
            made = self._run("decode", {**own, **pool.gather(self._state_read("decode"), into)})
            for task, value in zip(self.manifest.tasks, made, strict=True):
                logits[task][users, :most] = value[:, :most]
        return logits

    def _state_read(self, name: str) -> list[TensorSpec]:
        """What a graph reads of the state."""
        return [spec for spec in self.manifest.graphs[name].inputs if spec.state is not None]

    def _of_users(self, name: str, inputs: Arrays, users: NDArray[np.int64]) -> tuple[dict[str, NDArray[Any]], int]:
        """A graph's inputs of some users, their events cut to the longest of them; and how many that leaves."""
        longest = max(1, int(inputs["history_length"][users].max()))
        graph = self.manifest.graphs[name]
        events = {spec.name for spec in graph.inputs if spec.dims[1:2] == ("L",)}
        return {
            spec.name: inputs[spec.name][users][:, :longest] if spec.name in events else inputs[spec.name][users]
            for spec in graph.inputs
            if spec.state is None
        }, longest

    def _run(self, name: str, inputs: Arrays) -> list[NDArray[Any]]:
        """Runs a graph; contiguous inputs are read where they are. Outputs are in the graph's order."""
        graph = self.manifest.graphs[name]
        made: list[NDArray[Any]] = self._sessions[name].run(
            None, {spec.name: inputs[spec.name] for spec in graph.inputs}
        )
        return made

    def _run_into(self, name: str, inputs: Arrays, outputs: Sequence[NDArray[Any]]) -> None:
        """Runs a graph that writes its results into `outputs`."""
        graph = self.manifest.graphs[name]
        binding = self._sessions[name].io_binding()
        kept = [np.ascontiguousarray(inputs[spec.name]) for spec in graph.inputs]  # read by address
        for spec, value in zip(graph.inputs, kept, strict=True):
            binding.bind_input(spec.name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
        for spec, value in zip(graph.outputs, outputs, strict=True):
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


def _first_windows(pool: HostPool, slots: Sequence[int]) -> NDArray[np.int64]:
    """Tokens of each user's first window, the widest [U]."""
    return np.array([pool.lengths(slot)[0] for slot in slots], dtype=np.int64)
