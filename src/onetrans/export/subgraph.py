"""Parts of a captured graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from onetrans.errors import ExportError
from onetrans.export.program import Program
from onetrans.export.scope import is_size
from onetrans.spec import TensorSpec


def subgraph(
    program: Program, *, wanted: Mapping[fx.Node, TensorSpec], given: Mapping[fx.Node, TensorSpec] | None = None
) -> Program:
    """The part of a program that computes `wanted` from its inputs and from the values in `given`.

    Sizes are not carried across: each is read again from an input that has the same symbolic size.

    Args:
        program: The whole.
        wanted: Its values that the part returns, with the specs of the part's outputs.
        given: Its values that the part takes, with the specs of the inputs that they become.

    Raises:
        ExportError: A value that is needed lies on the other side.
    """
    given = given or {}
    needed: set[fx.Node] = set()
    pending = list(wanted)
    while pending:
        node = pending.pop()
        if node in needed:
            continue
        needed.add(node)
        if node not in given and not is_size(node):
            pending.extend(argument for argument in node.all_input_nodes if not is_size(argument))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs: list[TensorSpec] = []
    sources: list[tuple[fx.Node, fx.Node]] = []
    for node, spec in zip(program.placeholders(), program.inputs, strict=True):
        if node in needed:
            copies[node] = graph.placeholder(spec.name)
            inputs.append(spec)
            sources.append((node, copies[node]))
    for node, spec in given.items():
        copies[node] = graph.placeholder(spec.name)
        inputs.append(spec)
        sources.append((node, copies[node]))
    for node, made in sources:
        made.meta = dict(node.meta)
    sizes: dict[Any, tuple[fx.Node, int]] = {}
    for node, made in sources:
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt):
                sizes.setdefault(size.node.expr, (made, axis))

    def copy(node: fx.Node) -> fx.Node:
        if node in copies:
            return copies[node]
        if not is_size(node):
            raise ExportError(f"{node.name} is needed and lies on the other side of the cut")
        value = node.meta["val"]
        if isinstance(value, torch.SymInt) and value.node.expr in sizes:
            made = graph.call_function(torch.ops.aten.sym_size.int, sizes[value.node.expr])
        else:
            made = graph.node_copy(node, copy)
        made.meta = dict(node.meta)
        copies[node] = made
        return made

    for node in program.module.graph.nodes:
        if node in needed and node not in copies and not is_size(node):
            copies[node] = graph.node_copy(node, copy)
            copies[node].meta = dict(node.meta)
    graph.output(tuple(copy(node) for node in wanted))
    return Program(
        module=fx.GraphModule(program.module, graph),
        inputs=tuple(inputs),
        outputs=tuple(wanted.values()),
        ranges=program.ranges,
    )
