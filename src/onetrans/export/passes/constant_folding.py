"""Evaluates what depends on weights alone, once, at export: 1/sqrt(head_dim) into W_Q, slices of weights."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from onetrans.export.passes.dead_code import remove_dead_code
from onetrans.export.program import Program
from onetrans.export.scope import analyse, is_size


def fold_constants(program: Program) -> tuple[Program, tuple[str, ...]]:
    """Replaces constant-scope computations by their values; returns the names of the new constants.

    A folded constant is named after the largest weight in it; a fold that changes nothing keeps the weight itself.
    """
    scopes = analyse(program)
    weights = program.weights()
    values: dict[fx.Node, torch.Tensor] = {}
    origin: dict[fx.Node, str] = {}
    kept: dict[str, torch.Tensor] = {}
    folded: list[str] = []
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}

    def name_of(node: fx.Node) -> str:
        value = values[node]
        source = origin.get(node)
        if source is not None and _same(weights[source], value):
            return source
        stem = f"{source or node.name}_folded"
        names = [stem, *(f"{stem}{i}" for i in range(2, len(folded) + 3))]
        name = next(n for n in names if n not in kept or _same(kept[n], value))
        if name not in kept:
            folded.append(name)
        return name

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:
            name = name_of(node)
            kept[name] = values[node]
            copies[node] = graph.create_node("get_attr", name)
            copies[node].meta = dict(node.meta)
        return copies[node]

    for node in program.module.graph.nodes:
        if node.op == "get_attr":
            values[node], origin[node] = weights[str(node.target)], str(node.target)
        elif node.op == "call_function" and scopes[node] == "constant" and not is_size(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n] if n in values else n.meta["val"])
            with torch.no_grad():
                value = node.target(*args, **kwargs)
            values[node] = value.contiguous() if isinstance(value, torch.Tensor) else value
            sources = [origin[a] for a in node.all_input_nodes if a in origin]
            if sources:
                origin[node] = max(sources, key=lambda s: weights[s].numel())
        else:
            copies[node] = graph.node_copy(node, copy)
            copies[node].meta = dict(node.meta)
    program = dataclasses.replace(program, module=fx.GraphModule(kept, graph))
    return remove_dead_code(program)[0], tuple(folded)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))
