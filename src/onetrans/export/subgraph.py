"""Parts of a captured graph, and the names of their symbolic sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from onetrans.errors import ExportError
from onetrans.export.program import Program
from onetrans.export.scope import is_size
from onetrans.features.encode import DType, TensorSpec

DTYPES: dict[torch.dtype, DType] = {
    torch.int64: "int64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def subgraph(
    program: Program, *, wanted: list[fx.Node], outputs: tuple[str, ...], given: dict[fx.Node, str]
) -> Program:
    """The part of a program that computes `wanted` from its inputs and from the values in `given`.

    Sizes are not carried across: each is read again from an input that has the same symbolic size.
    """
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
    for node, name in given.items():
        copies[node] = graph.placeholder(name)
        copies[node].meta = dict(node.meta)
        inputs.append(tensor_spec(program, node, name))
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
        module=fx.GraphModule(program.module, graph), inputs=tuple(inputs), outputs=outputs, ranges=program.ranges
    )


def tensor_spec(program: Program, node: fx.Node, name: str) -> TensorSpec:
    """The spec of a user-scope value; symbolic sizes in terms of the inputs' symbols, as `min(L, 79)`.

    Raises:
        ExportError: The value has a dtype that no graph input may have.
    """
    value = node.meta["val"]
    dims = tuple(dim_name(size, program.symbols()) for size in value.shape)
    if value.dtype not in DTYPES:
        raise ExportError(f"{name} crosses the cut as {value.dtype}; a state holds int64 or floats of 16 or 32 bits")
    return TensorSpec(name=name, dtype=dtype_name(value.dtype), dims=dims, scope="user")


def dtype_name(dtype: torch.dtype) -> DType:
    """The name of a dtype that a graph input may have."""
    return DTYPES[dtype]


def dim_name(size: int | torch.SymInt, symbols: dict[Any, str]) -> str | int:
    """A size as an int, a symbol, or an expression of symbols such as `min(L, 79)`."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    if expression in symbols:
        return symbols[expression]
    if not expression.free_symbols:
        return int(expression)
    text = str(expression.subs({s: type(s)(symbols[s]) for s in expression.free_symbols if s in symbols}))
    return text.replace("Min(", "min(").replace("Max(", "max(")
