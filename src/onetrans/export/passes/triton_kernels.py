"""Every semantic op becomes the Triton kernel of its name, which captures see into."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import onetrans.kernels.candidate_attention.kernel
import onetrans.kernels.history_attention.kernel
import onetrans.kernels.history_attention.rows
import onetrans.kernels.mixed_ffn.kernel
import onetrans.kernels.mixed_linear.kernel  # noqa: F401  (these register the ops)
from onetrans.export.arguments import arguments, is_op, op_name
from onetrans.export.passes.base import Changed, Pass
from onetrans.export.passes.dead_code import remove_dead_code
from onetrans.export.program import Program
from onetrans.export.rebuild import Builder, rebuild

OURS, KERNELS = "onetrans::", "onetrans_triton"
CONTIGUOUS = torch.ops.aten.contiguous.default


class TritonKernels(Pass):
    """Calls the kernels; changed are the ops that were called before.

    Candidate attention reads its queries, keys and values as parts of wider rows, so that what made them contiguous
    goes.
    """

    name = "triton_kernels"

    def call(self, program: Program) -> Changed:
        """See `Pass.call`."""
        replaced: list[str] = []

        def visit(build: Builder, node: fx.Node) -> Any:
            stem = op_name(node).removeprefix(OURS)
            if not op_name(node).startswith(OURS):
                return None
            replaced.append(node.name)
            kernel = getattr(getattr(torch.ops, KERNELS), stem).default
            parts = {}
            if stem == "candidate_attention":
                given = arguments(node)
                parts = {name: build.new(_uncopied(given[name])) for name in ("q", "k", "v")}
            return build.retarget(node, kernel, **parts)

        return Changed(program=remove_dead_code(rebuild(program, visit)), changed=tuple(replaced))

    def ensures(self, before: Program, after: Program) -> str | None:
        """See `Pass.ensures`."""
        left = [node.name for node in after.module.graph.nodes if op_name(node).startswith(OURS)]
        return f"{', '.join(left)} still call ops that are no kernels" if left else None


def _uncopied(x: fx.Node) -> fx.Node:
    """What a contiguous() copied."""
    source: fx.Node = arguments(x)["self"] if is_op(x, CONTIGUOUS) else x
    return source
