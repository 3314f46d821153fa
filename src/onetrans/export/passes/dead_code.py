"""Removes what no output depends on: above all the S-queries of the top layer, which feed nothing."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from onetrans.export.program import Program


def remove_dead_code(program: Program) -> tuple[Program, tuple[str, ...]]:
    """Keeps the placeholders, what the outputs need and what writes into an input; returns the names of what went.

    Asserts that the exporter wrote down have no users and go too; they are not computations and are not named.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    needed: set[fx.Node] = set()
    pending = program.results() + [node for node in program.module.graph.nodes if _writes(node)]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    dead = []
    for node in program.module.graph.nodes:
        if node.op in ("placeholder", "output") or node in needed:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            copies[node].meta = dict(node.meta)
        elif node.op == "call_function" and "assert" not in node.name and node.meta.get("val") is not None:
            dead.append(node.name)
    module = fx.GraphModule(program.module, graph)
    return dataclasses.replace(program, module=module), tuple(dead)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
