"""Evaluates what depends on weights alone, once, at export: 1/sqrt(head_dim) into W_Q, slices of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from onetrans.export.passes.base import Changed, Pass
from onetrans.export.passes.dead_code import remove_dead_code
from onetrans.export.program import Program
from onetrans.export.rebuild import DROP, Builder, rebuild
from onetrans.export.scope import analyse, is_size


class ConstantFolding(Pass):
    """Replaces constant-scope computations by their values; changed are the new constants.

    A folded constant is named after the largest weight in it; a fold that changes nothing keeps the weight itself.
    """

    name = "constant_folding"

    def call(self, program: Program) -> Changed:
        """See `Pass.call`."""
        values, origin = _evaluate(program)
        weights = program.weights()
        made: dict[fx.Node, fx.Node] = {}
        folded: list[str] = []

        def constant(build: Builder, node: fx.Node) -> fx.Node:
            """The constant of a folded node, read where it is first needed, so that unused ones leave no trace."""
            if node not in made:
                source = origin.get(node)
                unchanged = source is not None and _same(weights[source], values[node])
                stem = source if unchanged and source is not None else f"{source or node.name}_folded"
                made[node] = build.constant(stem, values[node])
                made[node].meta = dict(node.meta)
                if not unchanged and made[node].target not in folded:
                    folded.append(str(made[node].target))
            return made[node]

        def visit(build: Builder, node: fx.Node) -> Any:
            if node in values:
                return DROP
            for source in node.all_input_nodes:
                if source in values:
                    build.provide(source, constant(build, source))
            return None

        def at_the_end(build: Builder) -> None:
            for node in program.results():
                if node in values:
                    build.provide(node, constant(build, node))

        return Changed(
            program=remove_dead_code(rebuild(program, visit, before_output=at_the_end)), changed=tuple(folded)
        )

    def ensures(self, before: Program, after: Program) -> str | None:
        """See `Pass.ensures`."""
        scopes = analyse(after)
        left = [node.name for node in after.module.graph.nodes if _is_constant(node, scopes[node])]
        return f"{', '.join(left)} still depend on weights alone" if left else None


def _is_constant(node: fx.Node, scope: str) -> bool:
    return node.op == "call_function" and scope == "constant" and not is_size(node)


def _evaluate(program: Program) -> tuple[dict[fx.Node, torch.Tensor], dict[fx.Node, str]]:
    """The value of every constant-scope node, and the largest weight that went into it."""
    scopes, weights = analyse(program), program.weights()
    values: dict[fx.Node, torch.Tensor] = {}
    origin: dict[fx.Node, str] = {}
    for node in program.module.graph.nodes:
        if node.op == "get_attr":
            values[node], origin[node] = weights[str(node.target)], str(node.target)
        elif _is_constant(node, scopes[node]):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n] if n in values else n.meta["val"])
            with torch.no_grad():
                value = node.target(*args, **kwargs)
            values[node] = value.contiguous() if isinstance(value, torch.Tensor) else value
            sources = [origin[a] for a in node.all_input_nodes if a in origin]
            if sources:
                origin[node] = max(sources, key=lambda s: weights[s].numel())
    return values, origin


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))
