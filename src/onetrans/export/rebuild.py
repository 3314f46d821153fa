"""The one seam through which rewrites make a new graph: `rebuild` copies a program, and a visitor says what differs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from onetrans.errors import ExportError
from onetrans.export.arguments import arguments, as_call
from onetrans.export.program import Program
from onetrans.spec import TensorSpec

DROP = object()  # what a visitor returns for a node that nothing may read any more


class Builder:
    """A graph under construction. Nodes that it gives belong to it; nodes of the program are translated by `new`."""

    def __init__(self, program: Program) -> None:
        self.graph = fx.Graph()
        self.fake = program.placeholders()[0].meta["val"].fake_mode
        self.weights: dict[str, torch.Tensor] = program.weights()
        self.inputs: dict[fx.Node, TensorSpec] = {}
        self._specs = dict(zip(program.placeholders(), program.inputs, strict=True))
        self._new: dict[fx.Node, fx.Node] = {}

    def new(self, value: Any) -> Any:
        """A value in terms of the new graph: a node, or arguments that hold nodes.

        Raises:
            ExportError: A node in it was dropped.
        """
        return fx.map_arg(value, self._translate)

    def copy(self, node: fx.Node, **changes: Any) -> fx.Node:
        """A copy of a node with its notes; some arguments, by name, replaced by values of the new graph."""
        if changes:
            assert isinstance(node.target, torch._ops.OpOverload)
            return self.retarget(node, node.target, **changes)
        made = self.graph.node_copy(node, self._translate)
        made.meta = dict(node.meta)
        if node.op == "placeholder":
            self.inputs[made] = self._specs[node]
        return made

    def retarget(self, node: fx.Node, target: torch._ops.OpOverload, **changes: Any) -> fx.Node:
        """A copy of a node that calls another op with arguments of the same names; its fake value stays."""
        kept = {name: value for name, value in arguments(node).items() if name not in changes}
        args, kwargs = as_call(target, {**self.new(kept), **changes})
        made = self.graph.create_node("call_function", target, args, kwargs, name=node.name)
        made.meta = dict(node.meta)
        return made

    def call(self, target: Callable[..., Any], *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
        """A new call, with its fake value; arguments are of the new graph."""
        made = self.graph.create_node("call_function", target, args, kwargs, name=name)
        self.refresh(made)
        return made

    def constant(self, name: str, value: torch.Tensor) -> fx.Node:
        """A read of a new weight; a name that is taken by another value gets a number."""
        names = itertools.chain([name], (f"{name}{i}" for i in itertools.count(2)))
        free = next(n for n in names if n not in self.weights or _same(self.weights[n], value))
        self.weights[free] = value
        node = self.graph.create_node("get_attr", free)
        node.meta["val"] = self.fake.from_tensor(value, static_shapes=True)
        return node

    def placeholder(self, spec: TensorSpec, value: torch.Tensor) -> fx.Node:
        """A new input, behind those that there are; `value` is its fake value."""
        last = next(reversed(self.inputs), None)
        at = self.graph.inserting_after(last) if last is not None else self.graph.inserting_before()
        with at:
            node = self.graph.placeholder(spec.name)
        node.meta["val"] = value
        self.inputs[node] = spec
        return node

    def provide(self, node: fx.Node, made: fx.Node) -> None:
        """Says what a node of the program is in the new graph, where a visitor dropped it for the time being."""
        self._new[node] = made

    def refresh(self, node: fx.Node) -> None:
        """Computes a call's fake value from those of its arguments."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        assert callable(node.target)
        with enable_python_dispatcher(), self.fake:
            node.meta["val"] = node.target(*args, **kwargs)

    def _translate(self, node: fx.Node) -> fx.Node:
        if node not in self._new:
            raise ExportError(f"{node.name} is still read, and was dropped")
        return self._new[node]


Visitor = Callable[[Builder, fx.Node], Any]


def rebuild(
    program: Program,
    visit: Visitor,
    *,
    refresh: bool = False,
    before_output: Callable[[Builder], None] = lambda build: None,
    outputs: Sequence[TensorSpec] | None = None,
) -> Program:
    """A new program from a program, node by node; the given one is left as it is.

    Args:
        program: The program to copy.
        visit: Called with every node but the output, in order. Returns the node of the new graph that takes its place
            (as `Builder.copy`, `call` or `new` give it), DROP where nothing may read it any more, or None to copy it.
        refresh: Whether shapes change, so that the fake values of all calls are computed anew.
        before_output: Called before the outputs are put together.
        outputs: Those of the program's outputs that the new one gives; all if left out.

    Returns:
        The new program. Its inputs are those that were copied or made; its outputs are the old ones, their specs read
        off the new values where `refresh` is set.

    Raises:
        ExportError: A node was dropped that another one reads.
    """
    build = Builder(program)
    results: Any = None
    for node in program.module.graph.nodes:
        if node.op == "output":
            before_output(build)
            kept = zip(program.outputs, program.results(), strict=True)
            results = build.new(tuple(value for spec, value in kept if outputs is None or spec in outputs))
            continue
        found = visit(build, node)
        if found is DROP:
            continue
        made = build.copy(node) if found is None else found
        if refresh and found is None and node.op == "call_function":
            build.refresh(made)
        build._new[node] = made
    build.graph.output(results)
    read = {str(node.target) for node in build.graph.nodes if node.op == "get_attr"}
    weights = {name: value for name, value in build.weights.items() if name in read}
    made = dataclasses.replace(
        program,
        module=fx.GraphModule(weights, build.graph),
        inputs=tuple(build.inputs[node] for node in build.graph.nodes if node.op == "placeholder"),
        outputs=program.outputs if outputs is None else tuple(spec for spec in program.outputs if spec in outputs),
    )
    return made.specified() if refresh else made


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))
