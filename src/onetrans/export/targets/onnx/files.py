"""The files of ONNX graphs: each graph without its large weights, and one weights file that all of them share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from onnxscript import ir
from safetensors.torch import save_file

from onetrans.export.targets.base import Artifact
from onetrans.runtime.manifest import WEIGHTS_FILE, Graph

INLINE_BYTES = 1024  # smaller constants stay in the graph


def write(artifacts: Mapping[str, Artifact[ir.Model]], folder: Path) -> dict[str, Graph]:
    """Writes the graphs and the one weights file that they share: `onetrans.export.targets.base.Lowering.write`."""
    tensors, where = external_weights({name: artifact.value for name, artifact in artifacts.items()})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    offsets = safetensors_offsets(folder / WEIGHTS_FILE)
    graphs = {}
    for name, artifact in artifacts.items():
        names = {initializer: tensor for (graph, initializer), tensor in where.items() if graph == name}
        graphs[name] = Graph(
            file=f"{name}.onnx",
            inputs=artifact.inputs,
            outputs=artifact.outputs,
            weights=tuple(sorted(set(names.values()))),
        )
        (folder / graphs[name].file).write_bytes(serialise(artifact.value, names, offsets, WEIGHTS_FILE))
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


def external_weights(models: Mapping[str, ir.Model]) -> tuple[dict[str, torch.Tensor], dict[tuple[str, str], str]]:
    """The constants of all graphs that go into the weights file, equal ones once.

    Returns:
        Tensors by name, and for (graph, initializer) the name its tensor has there.
    """
    tensors: dict[str, torch.Tensor] = {}
    where: dict[tuple[str, str], str] = {}
    for graph, model in models.items():
        for initializer in model.graph.initializers.values():
            assert initializer.const_value is not None
            assert initializer.name is not None
            if initializer.const_value.nbytes < INLINE_BYTES:
                continue
            value = _as_torch(initializer.const_value)
            stem, name, count = initializer.name, initializer.name, 1
            while name in tensors and not _same(tensors[name], value):
                count += 1
                name = f"{stem}.{count}"
            tensors[name] = value
            where[graph, initializer.name] = name
    return tensors, where


def serialise(model: ir.Model, names: Mapping[str, str], offsets: Mapping[str, tuple[int, int]], file: str) -> bytes:
    """The model's bytes with its large initializers in `file`.

    Args:
        model: As `lower` gives it.
        names: Initializer to its tensor in the weights file.
        offsets: Tensor to (offset, length) in that file, bytes.
        file: The weights file, beside the model.
    """
    for initializer in list(model.graph.initializers.values()):
        assert initializer.name is not None
        if initializer.name not in names:
            continue
        tensor = initializer.const_value
        assert tensor is not None
        offset, length = offsets[names[initializer.name]]
        name = names[initializer.name]
        if name != initializer.name:
            model.graph.initializers.pop(initializer.name)
            initializer.name = name
            model.graph.initializers[name] = initializer
        initializer.const_value = ir.ExternalTensor(
            file,
            offset,
            length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
        )
    proto = ir.to_proto(model)
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


def _as_torch(tensor: Any) -> torch.Tensor:
    raw = getattr(tensor, "raw", None)
    if isinstance(raw, torch.Tensor):
        return raw.detach().contiguous()
    return torch.from_numpy(tensor.numpy().copy())


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))
