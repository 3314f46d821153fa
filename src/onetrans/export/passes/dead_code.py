"""Removes what no output depends on: above all the S-queries of the top layer, which feed nothing."""

from __future__ import annotations

import torch
from torch import fx

from onetrans.export.passes.base import Changed, Pass
from onetrans.export.program import Program
from onetrans.export.rebuild import DROP, rebuild


class DeadCode(Pass):
    """Keeps the inputs, what the outputs need and what writes into an input; changed are the computations that went.

    Asserts that the exporter wrote down have no users and go too; they are not computations and are not named.
    """

    name = "dead_code"

    def call(self, program: Program) -> Changed:
        """See `Pass.call`."""
        needed = _needed(program)
        dead = [node.name for node in program.module.graph.nodes if node not in needed and _computes(node)]
        kept = rebuild(program, lambda build, node: None if node.op == "placeholder" or node in needed else DROP)
        return Changed(program=kept, changed=tuple(dead))

    def ensures(self, before: Program, after: Program) -> str | None:
        """See `Pass.ensures`."""
        needed = _needed(after)
        dead = [n.name for n in after.module.graph.nodes if n.op in ("call_function", "get_attr") and n not in needed]
        return f"{', '.join(dead)} still feed nothing" if dead else None


def remove_dead_code(program: Program) -> Program:
    """The program without what feeds nothing; for passes that leave such nodes behind."""
    return DeadCode().call(program).program


def _needed(program: Program) -> set[fx.Node]:
    needed: set[fx.Node] = set()
    pending = program.results() + [node for node in program.module.graph.nodes if _writes(node)]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    return needed


def _computes(node: fx.Node) -> bool:
    return node.op == "call_function" and "assert" not in node.name and node.meta.get("val") is not None


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
