"""In an append every new token queries in every layer, so the pyramid's choice of rows is the identity and goes."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from onetrans.export.passes.dead_code import remove_dead_code
from onetrans.export.program import Program

aten = torch.ops.aten
Q_START = 3  # of onetrans.history_attention
VIEWS = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)


def keep_rows(program: Program) -> tuple[Program, tuple[str, ...]]:
    """The append graph without its row selections; returns the names of those that went.

    Holds for new tokens that no layer's window leaves out and that are no more than any window may hold; both are what
    makes an append exact (`onetrans.features.windows.can_append`), and the runtime checks them.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    gone: list[str] = []
    for node in program.module.graph.nodes:
        source = selected_from(node)
        if source is not None:
            copies[node] = copies[source]
            gone.append(node.name)
        elif node.target is torch.sym_min and isinstance(node.args[0], fx.Node):
            copies[node] = copies[node.args[0]]
        else:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            copies[node].meta = dict(node.meta)
    zeros: fx.Node | None = None
    for node in list(graph.nodes):
        if str(node.target) == "onetrans.history_attention.default":
            if zeros is None:  # every layer's first query is the first new token
                with graph.inserting_before(node):
                    zeros = graph.call_function(aten.zeros_like.default, (node.args[Q_START],))
            node.args = (*node.args[:Q_START], zeros, *node.args[Q_START + 1 :])
    with enable_python_dispatcher(), program.placeholders()[0].meta["val"].fake_mode:
        for node in graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)
    changed = dataclasses.replace(program, module=fx.GraphModule(program.module, graph))
    return remove_dead_code(changed)[0].specified(), tuple(gone)


def selected_from(node: fx.Node) -> fx.Node | None:
    """x [U, N, D], where the node is x's chosen rows [U, rows, D] (`onetrans.model.stack.take_rows`)."""
    picked = node.args[0] if node.target in VIEWS else None
    if not isinstance(picked, fx.Node) or picked.target is not aten.index_select.default:
        return None
    flat = picked.args[0]
    assert isinstance(flat, fx.Node)
    source = flat.args[0]
    return source if isinstance(source, fx.Node) and flat.target in VIEWS else None
