"""The pyramid's choice of rows in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import onetrans.kernels.history_attention.rows  # noqa: F401  (registers the op)
from onetrans.export.arguments import arguments
from onetrans.export.passes.base import Changed, Pass
from onetrans.export.passes.dead_code import remove_dead_code
from onetrans.export.passes.keep_rows import selected_from
from onetrans.export.program import Program
from onetrans.export.rebuild import Builder, rebuild


class QueriedRows(Pass):
    """Temporary until take_rows is an op."""

    name = "queried_rows"

    def call(self, program: Program) -> Changed:
        """See `Pass.call`."""

        def visit(build: Builder, node: fx.Node) -> Any:
            source = selected_from(node)
            if source is None:
                return None
            picked = arguments(node)["self"]
            index = arguments(arguments(picked)["index"])["self"]
            start = index.args[0].args[0].args[0].args[0]
            rows = arguments(node)["size"][1]
            made = build.graph.create_node(
                "call_function",
                torch.ops.onetrans_triton.queried_rows.default,
                build.new((source, start, rows)),
            )
            made.meta = dict(node.meta)
            return made

        return Changed(program=remove_dead_code(rebuild(program, visit)))
