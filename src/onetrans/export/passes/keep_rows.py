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
VIEWS = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)


class KeepRows(Pass):
    """Takes the row selections out of an append graph; changed are those that went.

    Holds for new tokens that no layer's window leaves out and that are no more than any window may hold; both are what
    makes an append exact (`onetrans.features.windows.Pyramid.can_append`), and the runtime checks them.
    """

    name = "keep_rows"

    def requires(self, program: Program) -> str | None:
        """See `Pass.requires`."""
        if any(spec.is_window for spec in program.inputs):
            return None
        return "the program takes no keys and values of a past, so that it is no append"

    def call(self, program: Program) -> Changed:
        """See `Pass.call`."""
        gone: list[str] = []
        zeros: list[fx.Node] = []  # every layer's first query is the first new token

        def visit(build: Builder, node: fx.Node) -> Any:
            source = selected_from(node)
            if source is not None:
                gone.append(node.name)
                return build.new(source)
            if node.target is torch.sym_min:
                return build.new(node.args[0])
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
        left = [node.name for node in after.module.graph.nodes if selected_from(node) is not None]
        return f"{', '.join(left)} still choose rows" if left else None


def selected_from(node: fx.Node) -> fx.Node | None:
    """x [U, N, D], where the node is x's chosen rows [U, rows, D] (`take_rows` of the model's stack)."""
    picked = arguments(node)["self"] if is_op(node, *VIEWS) else None
    if picked is None or not is_op(picked, aten.index_select.default):
        return None
    flat = arguments(picked)["self"]
    return arguments(flat)["self"] if is_op(flat, *VIEWS) else None
