"""Program: a captured graph in the form that scope analysis, passes and targets work on, to and from torch.export's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from onetrans.errors import ExportError
from onetrans.precision import of_torch
from onetrans.spec import Scope, State, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Program:
    """A captured graph.

    Attributes:
        module: Placeholders are the inputs in order, parameters and constants are `get_attr`; `meta["val"]` is kept.
        inputs: One spec per placeholder.
        outputs: One spec per output, in order.
        ranges: Least and greatest value of every symbol of the capture, as torch.export holds them.
    """

    module: fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ranges: Mapping[Any, Any]

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

    def spec(self, node: fx.Node, name: str, scope: Scope, state: State | None = None) -> TensorSpec:
        """The spec of a value of the graph; its symbolic sizes are in terms of the inputs' symbols, as `min(L, 79)`.

        Raises:
            ConfigError: Its dtype is none that a graph takes or gives.
        """
        value, symbols = node.meta["val"], self.symbols()
        dims = tuple(dim_name(size, symbols) for size in value.shape)
        return TensorSpec(name=name, dtype=of_torch(value.dtype).name, dims=dims, scope=scope, state=state)

    def specified(self) -> Program:
        """The same program, the outputs' specs read off its values again, as after a pass that changes shapes."""
        specs = zip(self.results(), self.outputs, strict=True)
        outputs = tuple(self.spec(node, old.name, old.scope, old.state) for node, old in specs)
        return dataclasses.replace(self, outputs=outputs)


def dim_name(size: int | torch.SymInt, symbols: Mapping[Any, str]) -> str | int:
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


def from_exported(exported: ExportedProgram, specs: Sequence[TensorSpec], outputs: Sequence[str]) -> Program:
    """The program of an export; parameters become constants of the graph, arguments that were None go.

    Args:
        exported: What torch.export gave.
        specs: One per tensor argument, in order.
        outputs: Names of the results, which are of candidate scope: a ranking model's scores.
    """
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
    module = fx.GraphModule(constants, graph)
    program = Program(module=module, inputs=tuple(specs), outputs=(), ranges=exported.range_constraints)
    results = program.results()
    if len(results) != len(outputs):
        raise ExportError(f"{len(outputs)} output names were given for {len(results)} outputs; name each of them")
    made = tuple(program.spec(node, name, "candidate") for node, name in zip(results, outputs, strict=True))
    return dataclasses.replace(program, outputs=made)


def to_exported(program: Program) -> ExportedProgram:
    """The program as torch.export would give it, for the exporters that take nothing else; constants become buffers.

    Built from the graph at hand: exporting it once more would trace every op again (0.7 of 3 s per graph of tiny).
    """
    weights = program.weights()
    placeholders = program.placeholders()
    fake = placeholders[0].meta["val"].fake_mode
    graph = fx.Graph()
    lifted: dict[str, fx.Node] = {}
    inputs: list[InputSpec] = []
    for name, value in weights.items():
        lifted[name] = graph.placeholder("c_" + name.replace(".", "_"))
        lifted[name].meta["val"] = fake.from_tensor(value, static_shapes=True)
        argument = TensorArgument(name=lifted[name].name)
        inputs.append(InputSpec(InputKind.BUFFER, argument, name, persistent=True))
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.module.graph.nodes:
        if node.op == "get_attr":
            copies[node] = lifted[str(node.target)]
            continue
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        copies[node].meta = dict(node.meta)
    arguments = [TensorArgument(name=copies[node].name) for node in placeholders]
    results = [TensorArgument(name=copies[node].name) for node in program.results()]
    inputs += [InputSpec(InputKind.USER_INPUT, argument, None) for argument in arguments]
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, argument, None) for argument in results]
    call = ModuleCallSignature(
        inputs=list(arguments),
        outputs=list(results),
        in_spec=pytree.tree_structure((tuple(arguments), {})),
        out_spec=pytree.tree_structure(tuple(results)),
    )
    return ExportedProgram(
        root=torch.nn.Module(),
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict=weights,
        range_constraints=dict(program.ranges),
        module_call_graph=[ModuleCallEntry("", call)],
        constants={},
    )
