"""The toy target's lowering; see `onetrans.export.targets.base.Lowering`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onetrans.export.targets import onnx
from onetrans.export.targets.base import Artifact
from onetrans.runtime.manifest import Graph

lower = onnx.lower


def write(artifacts: Mapping[str, Artifact[Any]], folder: Path) -> dict[str, Graph]:
    graphs = {}
    for name, graph in onnx.write(artifacts, folder).items():
        graphs[name] = dataclasses.replace(graph, file=f"{name}.toy")
        (folder / graphs[name].file).write_bytes((folder / graph.file).read_bytes()[::-1])
        (folder / graph.file).unlink()
    return graphs
