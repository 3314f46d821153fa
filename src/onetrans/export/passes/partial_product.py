"""linear(concat(user, candidate)) becomes linear(user) + linear(candidate), so that the user part runs in prefill."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from onetrans.export.capture import Program
from onetrans.export.scope import analyse

aten = torch.ops.aten


def split_partial_products(program: Program) -> tuple[Program, tuple[str, ...]]:
    """Rewrites every linear over a last-axis concatenation of broadcast user-scope and candidate-scope parts.

    The user part is taken before it is broadcast over the candidates, so its product has one row per user. The bias goes
    with the user part. Returns the names of the user-scope products.
    """
    graph = program.module.graph
    made = []
    for node in list(graph.nodes):
        if node.target is not aten.linear.default:
            continue
        scopes = analyse(program)
        concat = node.args[0]
        if concat.target is not aten.cat.default or scopes[concat] != "candidate" or not _last_axis(concat):
            continue
        parts = concat.args[0]
        user = [i for i, part in enumerate(parts) if _before_broadcast(part, scopes) is not None]
        if not user or len(user) == len(parts):
            continue
        made.append(_rewrite(graph, node, parts, user, scopes, len(made)))
    program.module.recompile()
    return dataclasses.replace(program), tuple(made)


def _last_axis(concat: fx.Node) -> bool:
    axis = concat.args[1] if len(concat.args) > 1 else 0
    return axis in (-1, concat.meta["val"].dim() - 1)


def _before_broadcast(part: fx.Node, scopes: dict[fx.Node, str]) -> fx.Node | None:
    """The user-scope value that `part` repeats for each candidate, or None."""
    if part.target is aten.expand.default and scopes[part] == "candidate" and scopes[part.args[0]] == "user":
        return part.args[0]
    return part if scopes[part] == "user" else None


def _rewrite(
    graph: fx.Graph, node: fx.Node, parts: list[fx.Node], user: list[int], scopes: dict[fx.Node, str], count: int
) -> str:
    weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
    fake = weight.meta["val"]

    def call(target: torch._ops.OpOverload, *args: object, name: str | None = None) -> fx.Node:
        created = graph.create_node("call_function", target, args, name=name)
        created.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        return created

    def product(chosen: list[int], values: list[fx.Node], with_bias: bool, name: str | None) -> fx.Node:
        columns, offset = [], 0
        for i, part in enumerate(parts):
            width = part.meta["val"].shape[-1]
            if i in chosen:
                columns.append(call(aten.slice.Tensor, weight, 1, offset, offset + width))
            offset += width
        assert offset == fake.shape[1]
        w = columns[0] if len(columns) == 1 else call(aten.cat.default, columns, 1)
        x = values[0] if len(values) == 1 else call(aten.cat.default, values, -1)
        return call(aten.linear.default, x, w, *([bias] if with_bias and bias is not None else []), name=name)

    with graph.inserting_before(node):
        before = [_before_broadcast(parts[i], scopes) for i in user]
        rest = [i for i in range(len(parts)) if i not in user]
        partial = product(user, [b for b in before if b is not None], True, f"partial_product_{count}")
        total = call(aten.add.Tensor, product(rest, [parts[i] for i in rest], False, None), partial)
    node.replace_all_uses_with(total)
    graph.erase_node(node)
    return partial.name
