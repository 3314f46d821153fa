"""Nodes put into a graph with their fake values."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from onetrans.export.program import Program

aten = torch.ops.aten


def copied(program: Program) -> Program:
    """The program with a graph of its own."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.module.graph.nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        copies[node].meta = dict(node.meta)
    return dataclasses.replace(program, module=fx.GraphModule(program.weights(), graph))


def call(place: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    """A call before `place`."""
    with place.graph.inserting_before(place):
        node = place.graph.call_function(target, args)
    values = fx.map_arg(args, lambda n: n.meta["val"])
    fakes = [value for value in pytree.tree_leaves(values) if isinstance(value, FakeTensor)]
    with enable_python_dispatcher(), fakes[0].fake_mode:
        node.meta["val"] = target(*values)
    return node


def constant(place: fx.Node, program: Program, stem: str, value: torch.Tensor) -> fx.Node:
    """A weight of the graph, read before `place`, under the first free name that begins with `stem`."""
    module = program.module
    name = next(name for name in (f"{stem}{i}" for i in itertools.count()) if not hasattr(module, name))
    module.register_buffer(name, value, persistent=False)
    with place.graph.inserting_before(place):
        node = place.graph.get_attr(name)
    node.meta["val"] = place.meta["val"].fake_mode.from_tensor(value, static_shapes=True)
    return node


def sizes(place: fx.Node, x: fx.Node, axes: range) -> list[fx.Node | int]:
    """Sizes of x's axes, dynamic ones read before `place`."""
    shape = x.meta["val"].shape
    return [shape[i] if isinstance(shape[i], int) else call(place, aten.sym_size.int, x, i) for i in axes]


def alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two tensors have the same dtype and shape, whatever the dynamic sizes."""
    values = [node.meta["val"] for node in (one, other)]
    return len({(value.dtype, *map(str, value.shape)) for value in values}) == 1


def only_user(node: fx.Node) -> fx.Node | None:
    """What reads a value, where it is read once."""
    return next(iter(node.users)) if len(node.users) == 1 else None
