"""Export: a trained model becomes a verified bundle."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onetrans import __version__
from onetrans.export.capture import Program, capture
from onetrans.export.config import DTYPES, ExportConfig
from onetrans.export.gold import build_cases
from onetrans.export.probe import probe_split
from onetrans.export.split import Split, SplitReport, extract, split
from onetrans.export.targets.onnx.target import external_weights, lower, serialise
from onetrans.export.verify import CaseResult, StoredCase, check, verify
from onetrans.features.encode import TensorSpec, input_specs
from onetrans.features.folders import new_folder
from onetrans.features.schema import Feature
from onetrans.model.checkpoint import weights_hash
from onetrans.model.config import ModelConfig
from onetrans.model.onetrans import OneTrans
from onetrans.runtime.backends.registry import open_backend
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.manifest import (
    GOLD_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    Graph,
    Manifest,
    StateTensor,
    Windows,
)

log = logging.getLogger(__name__)


def export(
    model: OneTrans,
    output: str | Path,
    config: ExportConfig | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Bundle:
    """Captures, splits, lowers, writes and verifies a model.

    The bundle appears under its name only after it was verified; a crash leaves the folder that was there, or none.

    Args:
        model: In float32.
        output: A folder that does not exist yet.
        config: Target, precision and bounds.
        progress: Called with each stage's name as it begins.

    Raises:
        ConfigError: An unknown target or precision.
        OutputExistsError: `output` exists.
        ExportError: The graph cannot be captured, split or lowered.
        ParityError: The bundle is too far from gold.
    """
    config = config or ExportConfig()
    model = model.eval()
    stages = _Stages(progress)
    with new_folder(output) as folder:
        stages.begin("capture")
        whole, append = capture_model(model, config)
        stages.begin("split")
        parts = split(whole)
        programs = {"prefill": parts.prefill, "decode": parts.decode}
        if append is not None:
            programs["append"] = extract(append, parts.prefill.outputs)
        stages.begin("probe")
        examples = _probe(model.config, parts)
        stages.begin("gold")
        cases = build_cases(model, max_candidates=config.max_candidates, max_users=config.max_users, seed=config.seed)
        stages.begin("lower")
        graphs = write_graphs(programs, parts.report, model.config, config, examples, folder)
        stages.begin("write")
        _write_gold(cases, folder)
        manifest = _manifest(model, config, graphs, parts.report, cases, folder)
        stages.begin("verify")
        results = _verify(manifest, folder, [case.name for case in cases])
        parity = {"case_names": [case.name for case in cases], "results": [dataclasses.asdict(r) for r in results]}
        _write_manifest(dataclasses.replace(manifest, parity=parity), folder)
        stages.end()
    return Bundle.open(output)


def capture_model(model: OneTrans, config: ExportConfig) -> tuple[Program, Program | None]:
    """Captures the forward with an empty state and, where appending can be exact, with a non-empty one."""
    c = model.config
    specs = {spec.name: spec for spec in input_specs(c.schema)}
    sizes = {"U": 2, "C": 3, "L": 5}
    bounds = {**_request_bounds(config), "L": (1, c.window_bounds[0])}
    inputs = random_inputs(c, sizes, seed=0)
    user = {name: value for name, value in inputs.items() if specs[name].scope == "user"}
    candidate = {name: value for name, value in inputs.items() if specs[name].scope == "candidate"}
    order = [specs[name] for name in (*user, *candidate)]
    whole = capture(model, (user, candidate, None), order, bounds, c.tasks)
    if c.merge != "time" or c.append_chunk == 1:
        return whole, None
    past, past_specs = [], []
    for layer in range(c.layers):
        width = f"W{layer}"
        bounds[width] = (1, c.window_bounds[layer])
        shape = (sizes["U"], c.heads, 7 + layer, c.head_dim)
        past.append((torch.randn(shape), torch.randn(shape)))
        past_specs += [
            TensorSpec(
                name=f"past_{kind}{layer}", dtype="float32", dims=("U", c.heads, width, c.head_dim), scope="user"
            )
            for kind in ("k", "v")
        ]
    return whole, capture(model, (user, candidate, past), [*order, *past_specs], bounds, c.tasks)


def random_inputs(config: ModelConfig, sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
    """Inputs of every spec, with full histories; ids 1 and up, so that two seeds differ wherever they can."""
    generator = torch.Generator().manual_seed(seed)
    features = {f"{part}_{feature.name}": feature for part, feature in config.schema.features()}
    inputs: dict[str, torch.Tensor] = {}
    for spec in input_specs(config.schema):
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims]
        if spec.name == "event_behaviour":
            inputs[spec.name] = torch.randint(0, len(config.schema.behaviours), shape, generator=generator)
        elif spec.name == "history_length":
            inputs[spec.name] = torch.full(shape, sizes["L"] - seed % 2)
        elif spec.name == "history_start":
            inputs[spec.name] = torch.zeros(shape, dtype=torch.int64)
        else:
            inputs[spec.name] = _random_feature(features[spec.name], shape, generator)
    return inputs


def _random_feature(feature: Feature, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    if feature.kind == "numeric":
        return torch.randn(shape, generator=generator)
    return torch.randint(1, feature.vocab, shape, generator=generator)


def _request_bounds(config: ExportConfig) -> dict[str, tuple[int, int]]:
    return {"U": (1, config.max_users), "C": (1, config.max_candidates)}


def _probe(config: ModelConfig, parts: Split) -> dict[str, torch.Tensor]:
    sizes = {"U": 2, "C": 3, "L": 5}
    by_scope: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
    scope = {spec.name: spec.scope for spec in parts.whole.inputs}
    for seed in (0, 1):
        inputs = random_inputs(config, sizes, seed)
        by_scope.append(
            (
                {name: value for name, value in inputs.items() if scope[name] == "user"},
                {name: value for name, value in inputs.items() if scope[name] == "candidate"},
            )
        )
    (user_a, candidates_a), (user_b, candidates_b) = by_scope
    probe_split(parts, user_a, user_b, candidates_a, candidates_b)
    examples = {**user_a, **candidates_a}
    with torch.inference_mode():
        state = parts.prefill.module(*(examples[spec.name] for spec in parts.prefill.inputs))
    return {**examples, **{name: value.clone() for name, value in zip(parts.prefill.outputs, state, strict=True)}}


def write_graphs(
    programs: Mapping[str, Program],
    report: SplitReport,
    model: ModelConfig,
    config: ExportConfig,
    examples: Mapping[str, torch.Tensor],
    folder: Path,
) -> dict[str, Graph]:
    """Lowers every program and writes the graphs and the one weights file they share."""
    from safetensors.torch import save_file

    float_specs = {
        task: TensorSpec(name=task, dtype="float32", dims=("U", "C"), scope="candidate") for task in model.tasks
    }
    cut = {spec.name: spec for spec in report.cut}
    models: dict[str, Any] = {}
    specs, graphs = {}, {}
    for name, program in programs.items():
        began = time.perf_counter()
        outputs = tuple(float_specs[o] if name == "decode" else cut[o] for o in program.outputs)
        bounds = _bounds_of(program, model, config)
        values = {**examples, **_past_examples(program, model)}
        models[name] = lower(program, values, bounds, outputs, name)
        specs[name] = program.inputs, outputs
        nodes = sum(1 for _ in models[name].graph.all_nodes())
        log.info("lower %s: %d nodes, %.0f ms", name, nodes, 1e3 * (time.perf_counter() - began))
    tensors, where = external_weights(models)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
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


def _bounds_of(program: Program, model: ModelConfig, config: ExportConfig) -> dict[str, tuple[int, int]]:
    known = _request_bounds(config)
    bounds = {}
    for spec in program.inputs:
        for dim in spec.dims:
            if isinstance(dim, str):
                bounds[dim] = known.get(dim) or (1, window_capacity(dim, model))
    return bounds


def window_capacity(dim: str, model: ModelConfig) -> int:
    """Most tokens of a symbolic window size: `L`, `W2` or `min(L, 79)`."""
    if dim == "L":
        return model.window_bounds[0]
    if dim.startswith("W"):
        return model.window_bounds[int(dim[1:])]
    return min(int(number) for number in dim.removeprefix("min(").rstrip(")").split(", ") if number != "L")


def _past_examples(program: Program, model: ModelConfig) -> dict[str, torch.Tensor]:
    return {
        spec.name: torch.randn(2, model.heads, 7 + int(str(spec.dims[2])[1:]), model.head_dim)
        for spec in program.inputs
        if spec.name.startswith("past_")
    }


def _write_gold(cases: list[StoredCase], folder: Path) -> None:
    from safetensors.numpy import save_file

    tensors = {}
    for index, case in enumerate(cases):
        for kind in ("inputs", "before", "gold", "reference"):
            for name, value in getattr(case, kind).items():
                tensors[f"{index}/{kind}/{name}"] = np.ascontiguousarray(value)
    save_file(tensors, folder / GOLD_FILE)


def _manifest(
    model: OneTrans,
    config: ExportConfig,
    graphs: Mapping[str, Graph],
    report: SplitReport,
    cases: list[StoredCase],
    folder: Path,
) -> Manifest:
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
        bounds={**_request_bounds(config), "L": (0, c.window_bounds[0])},
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


def _write_manifest(manifest: Manifest, folder: Path) -> None:
    (folder / MANIFEST_FILE).write_text(manifest.dumps(), encoding="utf-8")


def _verify(manifest: Manifest, folder: Path, names: list[str]) -> list[CaseResult]:
    from onetrans.export.verify import read_cases

    _write_manifest(manifest, folder)
    bundle = Bundle.open(folder)
    results = verify(bundle, open_backend(bundle), read_cases(bundle))
    check(results)
    return results


class _Stages:
    """Reports each stage as it begins, and how long it took."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self.progress = progress
        self.name = ""
        self.began = 0.0

    def begin(self, name: str) -> None:
        self.end()
        self.name, self.began = name, time.perf_counter()
        self.progress(name)

    def end(self) -> None:
        if self.name:
            log.info("stage %s: %.0f ms", self.name, 1e3 * (time.perf_counter() - self.began))
        self.name = ""
