"""In an append every new token queries in every layer, so the pyramid's choice of rows is the identity and goes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import onetrans.kernels  # noqa: F401  (registers the ops)
from onetrans.export.arguments import arguments, is_op
from onetrans.export.passes.base import Changed, Pass
from onetrans.export.passes.dead_code import remove_dead_code
from onetrans.export.program import Program
from onetrans.export.rebuild import Builder, rebuild

aten = torch.ops.aten
HISTORY = torch.ops.onetrans.history_attention.default
TAKE_ROWS = torch.ops.onetrans.take_rows.default


class KeepRows(Pass):
    """Takes the row selections out of an append graph; changed are those that went.

    Holds for new tokens that no layer's window leaves out and that are no more than any window may hold; both are what
    makes an append exact (`onetrans.features.windows.Pyramid.can_append`), and the runtime checks them.
    """

    name = "keep_rows"

    def requires(self, program: Program) -> str | None:
        """See `Pass.requires`."""
        if any(spec.is_window for spec in program.inputs) or not _selections(program):
            return None
        return "the program takes no keys and values of a past, so that it is no append and must choose rows"

    def call(self, program: Program) -> Changed:
        """See `Pass.call`."""
        gone: list[str] = []
        zeros: list[fx.Node] = []  # every layer's first query is the first new token

        def visit(build: Builder, node: fx.Node) -> Any:
            if is_op(node, TAKE_ROWS):
                gone.append(node.name)
                return build.new(arguments(node)["x"])
            if node.target is torch.sym_min:  # of the tokens that there are and those that a window may hold
                return build.new(node.all_input_nodes[0])
            if is_op(node, HISTORY):
                if not zeros:
                    zeros.append(build.call(aten.zeros_like.default, build.new(arguments(node)["q_start"])))
                made = build.copy(node, q_start=zeros[0])
                build.refresh(made)
                return made
            return None

        changed = rebuild(program, visit, refresh=True)
        return Changed(program=remove_dead_code(changed).specified(), changed=tuple(gone))

    def ensures(self, before: Program, after: Program) -> str | None:
        """See `Pass.ensures`."""
        left = _selections(after)
        return f"{', '.join(left)} still choose rows" if left else None


def _selections(program: Program) -> list[str]:
    return [node.name for node in program.module.graph.nodes if is_op(node, TAKE_ROWS)]
