"""linear(concat(user, candidate)) becomes linear(user) + linear(candidate), so that the user part runs in prefill."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.node import Argument

from onetrans.export.program import Program
from onetrans.export.scope import NodeScope, analyse

aten = torch.ops.aten


def split_partial_products(program: Program) -> tuple[Program, tuple[str, ...]]:
    """Rewrites every linear over a last-axis concatenation of broadcast user-scope and candidate-scope parts.

    The user part is taken before it is broadcast over the candidates, so its product has one row per user. The bias
    goes with the user part. Returns the names of the user-scope products.
    """
    graph = program.module.graph
    made: list[str] = []
    for node in list(graph.nodes):
        if node.target is not aten.linear.default:
            continue
        scopes = analyse(program)
        concat = node.args[0]
        assert isinstance(concat, fx.Node)
        if concat.target is not aten.cat.default or scopes[concat] != "candidate" or not _last_axis(concat):
            continue
        parts = concat.all_input_nodes
        user = {part: before for part in parts if (before := _before_broadcast(part, scopes)) is not None}
        if 0 < len(user) < len(parts) and len(parts) == len(_listed(concat)):
            made.append(_rewrite(graph, node, parts, user, f"partial_product_{len(made)}"))
    program.module.recompile()
    return dataclasses.replace(program), tuple(made)


def _listed(concat: fx.Node) -> Sequence[object]:
    parts = concat.args[0]
    assert isinstance(parts, Sequence)
    return parts


def _last_axis(concat: fx.Node) -> bool:
    axis = concat.args[1] if len(concat.args) > 1 else 0
    return axis in (-1, concat.meta["val"].dim() - 1)


def _before_broadcast(part: fx.Node, scopes: Mapping[fx.Node, NodeScope]) -> fx.Node | None:
    """The user-scope value that `part` repeats for each candidate, or None."""
    if part.target is aten.expand.default and scopes[part] == "candidate":
        (source, *_) = part.all_input_nodes
        return source if scopes[source] == "user" else None
    return part if scopes[part] == "user" else None


def _rewrite(
    graph: fx.Graph, node: fx.Node, parts: Sequence[fx.Node], user: Mapping[fx.Node, fx.Node], name: str
) -> str:
    _, weight, *bias = node.args
    assert isinstance(weight, fx.Node)

    def call(target: torch._ops.OpOverload, args: tuple[Argument, ...], name: str | None = None) -> fx.Node:
        created = graph.create_node("call_function", target, args, name=name)
        with enable_python_dispatcher(), node.meta["val"].fake_mode:
            created.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        return created

    def product(chosen: Mapping[fx.Node, fx.Node], bias: Sequence[Argument], name: str | None) -> fx.Node:
        columns, offset = [], 0
        for part in parts:
            width = part.meta["val"].shape[-1]
            if part in chosen:
                columns.append(call(aten.slice.Tensor, (weight, 1, offset, offset + width)))
            offset += width
        values = [chosen[part] for part in parts if part in chosen]
        w = columns[0] if len(columns) == 1 else call(aten.cat.default, (columns, 1))
        x = values[0] if len(values) == 1 else call(aten.cat.default, (values, -1))
        return call(aten.linear.default, (x, w, *bias), name)

    with graph.inserting_before(node):
        partial = product(user, bias, name)
        rest = product({part: part for part in parts if part not in user}, [], None)
        total = call(aten.add.Tensor, (rest, partial))
    node.replace_all_uses_with(total)
    graph.erase_node(node)
    return partial.name
