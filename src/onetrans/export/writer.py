"""Writes what a bundle holds: graphs and their weights, gold, manifest."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file as save_tensors

from onetrans import __version__
from onetrans.export.config import DTYPES, ExportConfig
from onetrans.export.inputs import request_bounds
from onetrans.export.program import Program
from onetrans.export.split import SplitReport
from onetrans.export.subgraph import tensor_spec
from onetrans.export.targets.onnx.target import external_weights, lower, serialise
from onetrans.features.encode import TensorSpec
from onetrans.model.checkpoint import weights_hash
from onetrans.model.config import ModelConfig
from onetrans.model.onetrans import OneTrans
from onetrans.parity.verify import StoredCase
from onetrans.runtime.manifest import GOLD_FILE, MANIFEST_FILE, WEIGHTS_FILE, Graph, Manifest, StateTensor, Windows

log = logging.getLogger(__name__)


def write_graphs(
    programs: Mapping[str, Program],
    report: SplitReport,
    model: ModelConfig,
    folder: Path,
) -> dict[str, Graph]:
    """Lowers every program and writes the graphs and the one weights file they share."""
    float_specs = {
        task: TensorSpec(name=task, dtype="float32", dims=("U", "C"), scope="candidate") for task in model.tasks
    }
    cut = {spec.name: spec for spec in report.cut}
    models: dict[str, Any] = {}
    specs, graphs = {}, {}
    for name, program in programs.items():
        began = time.perf_counter()
        outputs = tuple(float_specs[o] if name == "decode" else cut[o] for o in program.outputs)
        if name == "append":  # its windows hold the new tokens alone
            outputs = tuple(tensor_spec(program, *of) for of in zip(program.results(), program.outputs, strict=True))
        models[name] = lower(program, outputs, name)
        specs[name] = program.inputs, outputs
        nodes = sum(1 for _ in models[name].graph.all_nodes())
        log.info("lower %s: %d nodes, %.0f ms", name, nodes, 1e3 * (time.perf_counter() - began))
    tensors, where = external_weights(models)
    save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    offsets = safetensors_offsets(folder / WEIGHTS_FILE)
    for name, made in models.items():
        names = {initializer: tensor for (graph, initializer), tensor in where.items() if graph == name}
        inputs, outputs = specs[name]
        weights = tuple(sorted(set(names.values())))
        graphs[name] = Graph(file=f"{name}.onnx", weights=weights, inputs=inputs, outputs=outputs)
        (folder / graphs[name].file).write_bytes(serialise(made, names, offsets, WEIGHTS_FILE))
    return graphs


def safetensors_offsets(path: Path) -> dict[str, tuple[int, int]]:
    """(offset, length) in bytes of every tensor, from the beginning of the file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    base = 8 + size
    return {
        name: (base + e["data_offsets"][0], e["data_offsets"][1] - e["data_offsets"][0]) for name, e in header.items()
    }


def write_gold(cases: list[StoredCase], folder: Path) -> None:
    """Writes the parity cases."""
    tensors = {}
    for index, case in enumerate(cases):
        for kind in ("inputs", "before", "gold", "reference"):
            for name, value in getattr(case, kind).items():
                tensors[f"{index}/{kind}/{name}"] = np.ascontiguousarray(value)
    save_arrays(tensors, folder / GOLD_FILE)


def make_manifest(
    model: OneTrans,
    config: ExportConfig,
    graphs: Mapping[str, Graph],
    report: SplitReport,
    cases: list[StoredCase],
    folder: Path,
) -> Manifest:
    """The manifest of the files in `folder`, without parity results."""
    c = model.config
    state = []
    for spec in report.cut:
        layer = int(spec.name[1:]) if spec.name[:1] in "kv" and spec.name[1:].isdigit() else None
        capacity = 0 if layer is None else c.window_bounds[layer]
        state.append(StateTensor(spec=spec, window=layer, capacity=capacity))
    return Manifest(
        name=c.name,
        target=config.target,
        device="cpu",
        precision=DTYPES[config.precision],
        model=c.to_json(),
        weights_sha256=weights_hash(model),
        bounds={**request_bounds(config), "L": (0, c.window_bounds[0])},
        windows=Windows(max_history=c.max_history, keep=c.keep, append_chunk=c.append_chunk),
        append_only="append" in graphs,
        graphs=graphs,
        state=tuple(state),
        tasks=c.tasks,
        split=dataclasses.asdict(report),
        parity={"case_names": [case.name for case in cases]},
        tools={
            "onetrans-export": __version__,
            **{p: importlib.metadata.version(p) for p in ("torch", "onnx", "onnxscript")},
        },
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        files=_hash_files(folder),
    )


def _hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    hashed = {}
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST_FILE:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            hashed[path.name] = {"sha256": digest, "bytes": path.stat().st_size}
    return hashed


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Writes the manifest, over an earlier one of the unfinished folder."""
    (folder / MANIFEST_FILE).write_text(manifest.dumps(), encoding="utf-8")
