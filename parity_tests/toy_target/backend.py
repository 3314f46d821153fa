"""The toy target's backend; see `onetrans.runtime.backends.base.Backend`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from onetrans.errors import BundleError
from onetrans.runtime.backends.base import BackendOptions
from onetrans.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.manifest import Graph


def check_file(content: bytes, graph: Graph, path: Path) -> None:
    if not graph.file.endswith(".toy"):
        raise BundleError(f"{path} is no toy")


class ToyBackend(OnnxRuntimeCpu):
    device = "toybox"

    def __init__(self, bundle: Bundle, options: BackendOptions) -> None:
        graphs = {graph.file for graph in bundle.manifest.graphs.values()}
        turned = {name: data[::-1] if name in graphs else data for name, data in bundle.contents.items()}
        super().__init__(dataclasses.replace(bundle, contents=turned), options)
