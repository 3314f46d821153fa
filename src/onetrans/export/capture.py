"""Capture: a module's one `forward`, exported with dynamic shapes, as a graph whose placeholders are its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from onetrans.errors import ExportError
from onetrans.features.encode import TensorSpec


@dataclass(frozen=True, kw_only=True)
class Program:
    """A captured graph.

    Attributes:
        module: Placeholders are the inputs in order, parameters and constants are `get_attr`; `meta["val"]` is kept.
        inputs: One spec per placeholder.
        outputs: Names of the graph's outputs, in order.
    """

    module: fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]

    def placeholders(self) -> list[fx.Node]:
        """The input nodes, in order."""
        return [node for node in self.module.graph.nodes if node.op == "placeholder"]

    def results(self) -> list[fx.Node]:
        """The nodes whose values the graph returns, in order."""
        (output,) = (node for node in self.module.graph.nodes if node.op == "output")
        return list(output.args[0])

    def weights(self) -> dict[str, torch.Tensor]:
        """Every weight and constant that the graph reads, by name."""
        found: dict[str, torch.Tensor] = {}
        for node in self.module.graph.nodes:
            if node.op == "get_attr":
                value: object = self.module
                for part in str(node.target).split("."):
                    value = getattr(value, part)
                assert isinstance(value, torch.Tensor)
                found[str(node.target)] = value.detach()
        return found

    def symbols(self) -> dict[Any, str]:
        """Names of the symbolic sizes that stand alone as a dimension of an input."""
        found: dict[Any, str] = {}
        for node, spec in zip(self.placeholders(), self.inputs, strict=True):
            for size, dim in zip(node.meta["val"].shape, spec.dims, strict=True):
                if isinstance(size, torch.SymInt) and isinstance(dim, str):
                    found.setdefault(size.node.expr, dim)
        return found


def capture(
    module: torch.nn.Module,
    arguments: tuple[Any, ...],
    specs: Sequence[TensorSpec],
    bounds: Mapping[str, tuple[int, int]],
    outputs: Sequence[str],
) -> Program:
    """Exports `module(*arguments)` and turns parameters into constants of the graph.

    Args:
        module: In eval mode.
        arguments: Example inputs, nested as `forward` takes them; sizes of symbolic dimensions at least 2.
        specs: One per tensor of `arguments`, in flattening order.
        bounds: Least and greatest size of every symbol in the specs' dims.
        outputs: Names for the flattened outputs.

    Raises:
        ExportError: The module cannot be captured within the bounds.
    """
    tensors, tree = pytree.tree_flatten(arguments)
    given = [tensor for tensor in tensors if tensor is not None]
    if len(given) != len(specs):
        raise ExportError(f"{len(specs)} input specs were declared for {len(given)} inputs; declare one for each")
    dims = {name: Dim(name, min=least, max=most) for name, (least, most) in bounds.items()}
    remaining = iter(specs)
    shapes = [
        None if tensor is None else {i: dims[d] for i, d in enumerate(next(remaining).dims) if isinstance(d, str)}
        for tensor in tensors
    ]
    try:
        exported = torch.export.export(
            module, arguments, dynamic_shapes=pytree.tree_unflatten(shapes, tree), strict=False
        )
    except Exception as error:
        raise ExportError(f"torch.export cannot capture {type(module).__name__}: {error}") from error
    program = _as_program(exported, specs, outputs)
    if len(program.results()) != len(outputs):
        raise ExportError(f"{len(outputs)} output names were given for {len(program.results())} outputs")
    return program


def _as_program(exported: ExportedProgram, specs: Sequence[TensorSpec], outputs: Sequence[str]) -> Program:
    constants: dict[str, torch.Tensor] = {}
    targets: dict[str, str] = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT or spec.target is None:
            continue
        value = exported.state_dict.get(spec.target, exported.constants.get(spec.target))
        assert isinstance(value, torch.Tensor)
        constants[spec.target] = value.detach()
        targets[spec.arg.name] = spec.target
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    remaining = iter(specs)
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in targets:
            copies[node] = graph.create_node("get_attr", targets[node.name], name=node.name)
        elif node.op == "placeholder":
            if node.meta.get("val") is None:  # an argument that was None
                continue
            copies[node] = graph.placeholder(next(remaining).name)
        else:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
        copies[node].meta = dict(node.meta)
    return Program(module=fx.GraphModule(constants, graph), inputs=tuple(specs), outputs=tuple(outputs))
