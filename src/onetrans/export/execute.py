"""Runs programs in PyTorch: on a device, our captured ops by their references, lowered ones by their kernels."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from onetrans import kernels
from onetrans.export.program import Program

OPS = ("mixed_linear", "history_attention", "candidate_attention", "mixed_ffn")
Values = Mapping[str, torch.Tensor]
REFERENCES: Mapping[str, Callable[..., Any]] = {
    f"onetrans.{op}.default": getattr(kernels, f"{op}_reference") for op in OPS
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
LAUNCHES = {"mixed_ffn": 2, "candidate_attention": 2}  # kernels of an op of ours, where not one
NO_KERNEL = (
    "view", "reshape", "unsqueeze", "squeeze", "select", "slice", "transpose", "permute", "chunk", "split", "expand",
    "flatten", "sym_size", "t", "unflatten", "detach", "alias",
)  # fmt: skip


def _size(x: torch.Tensor, axis: int) -> int:
    return x.shape[axis]


PLAIN = {"aten.sym_size.int": _size, "aten.sym_size": _size}  # what torch.compile cannot trace of a captured graph


def on_device(
    program: Program, device: torch.device | str, memory: dict[Any, torch.Tensor], *, double: bool = False
) -> Program:
    """The program on a device, our captured ops by their references, sizes as Python reads them.

    `memory` takes the weights that are there already, so that programs share them; `double` computes in float64.
    """

    def moved(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device(device)
        return torch.float64 if double and value in FLOATS else value

    def weight(value: torch.Tensor) -> torch.Tensor:
        which = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype, double)
        if which not in memory:
            wide = torch.float64 if double and value.is_floating_point() else value.dtype
            memory[which] = value.to(device=device, dtype=wide)
        return memory[which]

    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.module.graph.nodes:
        made = graph.node_copy(node, lambda n: copies[n])
        if node.op == "call_function":
            made.target = (
                min if node.target is torch.sym_min else {**REFERENCES, **PLAIN}.get(str(node.target), node.target)
            )
            made.args = fx.node.map_aggregate(made.args, moved)
            made.kwargs = fx.node.map_aggregate(made.kwargs, moved)
        copies[node] = made
    constants = {name: weight(value) for name, value in program.weights().items()}
    return dataclasses.replace(program, module=fx.GraphModule(constants, graph))


def launches(program: Program, *, only: str = "") -> int:
    """Kernels that a run of a lowered program launches, by its graph; of ops whose names begin with `only`."""
    total = 0
    for node in program.module.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem and str(node.target).startswith(only):
            stem = str(node.target).split(".")[1] if "." in str(node.target) else ""
            total += 0 if stem in NO_KERNEL or not stem else LAUNCHES.get(stem, 1)
    return total


def call(program: Program, values: Values, module: Any = None) -> Callable[[], Any]:
    """A run on fixed inputs, to be called again and again; by a module compiled from the program's own, if given."""
    return functools.partial(
        program.module if module is None else module, *(values[spec.name] for spec in program.inputs)
    )


def by_name(program: Program, made: Any) -> dict[str, torch.Tensor]:
    """What a program gives, by name."""
    return {spec.name: value for spec, value in zip(program.outputs, made, strict=True)}


def run(program: Program, values: Values) -> dict[str, torch.Tensor]:
    """One run on inputs by name; outputs by name."""
    return by_name(program, call(program, values)())
