"""linear(concat(user, candidate)) becomes linear(user) + linear(candidate), so that the user part runs in prefill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from onetrans.export.arguments import arguments, is_op
from onetrans.export.passes.base import Changed, Pass
from onetrans.export.passes.dead_code import remove_dead_code
from onetrans.export.program import Program
from onetrans.export.rebuild import Builder, rebuild
from onetrans.export.scope import NodeScope, analyse

aten = torch.ops.aten
LINEAR, CONCAT, EXPAND = aten.linear.default, aten.cat.default, aten.expand.default


@dataclass(frozen=True)
class _Split:
    """A linear whose input joins parts of both scopes: the parts in order, and each user part before its broadcast."""

    parts: Sequence[fx.Node]
    user: Mapping[fx.Node, fx.Node]


class PartialProduct(Pass):
    """Rewrites every linear over a last-axis concatenation of broadcast user-scope and candidate-scope parts.

    The user part is taken before it is broadcast over the candidates, so its product has one row per user. The bias
    goes with the user part. Changed are the user-scope products.
    """

    name = "partial_product"

    def call(self, program: Program) -> Changed:
        """See `Pass.call`."""
        found = _find(program)
        made: list[str] = []

        def visit(build: Builder, node: fx.Node) -> Any:
            if node not in found:
                return None
            name = f"partial_product_{len(made)}"
            made.append(name)
            return _rewrite(build, node, found[node], name)

        changed = rebuild(program, visit)
        return Changed(program=remove_dead_code(changed) if made else changed, changed=tuple(made))

    def ensures(self, before: Program, after: Program) -> str | None:
        """See `Pass.ensures`."""
        left = [node.name for node in _find(after)]
        return f"{', '.join(left)} still multiply user and candidate values joined" if left else None


def _find(program: Program) -> dict[fx.Node, _Split]:
    scopes = analyse(program)
    found = {}
    for node in program.module.graph.nodes:
        if not is_op(node, LINEAR):
            continue
        concat = arguments(node)["input"]
        if not is_op(concat, CONCAT) or scopes[concat] != "candidate":
            continue
        given = arguments(concat)
        parts = given["tensors"]
        if given["dim"] not in (-1, concat.meta["val"].dim() - 1) or len(set(parts)) != len(parts):
            continue
        user = {part: before for part in parts if (before := _before_broadcast(part, scopes)) is not None}
        if 0 < len(user) < len(parts):
            found[node] = _Split(parts, user)
    return found


def _before_broadcast(part: fx.Node, scopes: Mapping[fx.Node, NodeScope]) -> fx.Node | None:
    """The user-scope value that `part` repeats for each candidate, or None."""
    if is_op(part, EXPAND) and scopes[part] == "candidate":
        source: fx.Node = arguments(part)["self"]
        return source if scopes[source] == "user" else None
    return part if scopes[part] == "user" else None


def _rewrite(build: Builder, node: fx.Node, found: _Split, name: str) -> fx.Node:
    given = arguments(node)
    weight, bias = build.new(given["weight"]), build.new(given["bias"])

    def product(chosen: Mapping[fx.Node, fx.Node], bias: fx.Node | None, name: str | None) -> fx.Node:
        columns, offset = [], 0
        for part in found.parts:
            width = part.meta["val"].shape[-1]
            if part in chosen:
                columns.append(build.call(aten.slice.Tensor, weight, 1, offset, offset + width))
            offset += width
        values = [build.new(chosen[part]) for part in found.parts if part in chosen]
        w = columns[0] if len(columns) == 1 else build.call(CONCAT, columns, 1)
        x = values[0] if len(values) == 1 else build.call(CONCAT, values, -1)
        return build.call(LINEAR, x, w, *([] if bias is None else [bias]), name=name)

    partial = product(found.user, bias, name)
    rest = product({part: part for part in found.parts if part not in found.user}, None, None)
    return build.call(aten.add.Tensor, rest, partial)
