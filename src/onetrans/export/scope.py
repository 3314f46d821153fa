"""Scope analysis: when each value of a graph is known, and what every symbolic size comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from onetrans.export.program import Program

NodeScope = Literal["constant", "user", "candidate"]
ORDER: tuple[NodeScope, ...] = ("constant", "user", "candidate")


@dataclass(frozen=True)
class HeldBack:
    """A value that could have been of user scope and is not.

    Attributes:
        node: The node.
        inputs: Its inputs of user scope.
        reason: Why it must wait for a candidate.
    """

    node: str
    inputs: tuple[str, ...]
    reason: str


def is_size(node: fx.Node) -> bool:
    """Whether the node's value is a size rather than a tensor."""
    return isinstance(node.meta.get("val"), (torch.SymInt, int))


def state_name(node: fx.Node) -> str:
    """The name that a `state_value` gave the node, or the node's own."""
    return str(node.meta.get("state_name", node.name))


def analyse(program: Program) -> dict[fx.Node, NodeScope]:
    """The scope of every node: candidate if any input is, else user, else constant (design: capture and split).

    A size is of candidate scope where it needs a symbol that no user-scope input carries: the number of candidates.
    """
    user_symbols: set[Any] = set()
    scopes: dict[fx.Node, NodeScope] = {}
    for node, spec in zip(program.placeholders(), program.inputs, strict=True):
        scopes[node] = spec.scope
        if spec.scope == "user":
            for size in node.meta["val"].shape:
                if isinstance(size, torch.SymInt):
                    user_symbols |= size.node.expr.free_symbols
    for node in program.module.graph.nodes:
        if node.op == "placeholder":
            continue
        if is_size(node):
            value = node.meta["val"]
            symbols = value.node.expr.free_symbols if isinstance(value, torch.SymInt) else set()
            scopes[node] = "constant" if not symbols else "user" if symbols <= user_symbols else "candidate"
        else:
            inputs = [scopes[argument] for argument in node.all_input_nodes]
            scopes[node] = max(inputs, key=ORDER.index, default="constant")
    return scopes


def held_back(program: Program, scopes: dict[fx.Node, NodeScope]) -> tuple[HeldBack, ...]:
    """Every candidate-scope value that reads user-scope values, with the candidate inputs that keep it in decode."""
    origins: dict[fx.Node, frozenset[str]] = {}
    found = []
    for node in program.module.graph.nodes:
        if node.op == "placeholder" and scopes[node] == "candidate":
            origins[node] = frozenset([node.name])
        elif is_size(node) and scopes[node] == "candidate":
            origins[node] = frozenset(["the number of candidates"])
        else:
            origins[node] = frozenset().union(*(origins[argument] for argument in node.all_input_nodes))
        if node.op != "call_function" or scopes[node] != "candidate" or is_size(node):
            continue
        user = tuple(state_name(a) for a in node.all_input_nodes if scopes[a] == "user" and not is_size(a))
        if user:
            causes = sorted(frozenset().union(*(origins[a] for a in node.all_input_nodes)))
            shown = ", ".join(causes[:3]) + (f" and {len(causes) - 3} more" if len(causes) > 3 else "")
            found.append(HeldBack(node.name, user, f"{_op_name(node)} joins it with {shown}"))
    return tuple(found)


def _op_name(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default")
