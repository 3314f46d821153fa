"""Turns every state_value op into notes on the value that it names: what it is called, its role, layer and capacity."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import onetrans.kernels.state_value  # noqa: F401  (registers the op)
from onetrans.export.arguments import arguments, is_op
from onetrans.export.passes.base import Changed, Pass
from onetrans.export.program import Program
from onetrans.export.rebuild import Builder, rebuild
from onetrans.spec import ROLES, State


class StateNames(Pass):
    """Takes the naming ops out of the graph; changed are the names."""

    name = "state_names"

    def call(self, program: Program) -> Changed:
        """See `Pass.call`."""
        names: list[str] = []

        def visit(build: Builder, node: fx.Node) -> Any:
            if not is_state_value(node):
                return None
            given = arguments(node)
            value: fx.Node = build.new(given["x"])
            value.meta["state_name"] = given["name"]
            if given["role"] in ROLES:
                value.meta["state"] = State(role=given["role"], layer=given["layer"], capacity=given["capacity"])
            names.append(given["name"])
            return value

        return Changed(program=rebuild(program, visit), changed=tuple(names))

    def ensures(self, before: Program, after: Program) -> str | None:
        """See `Pass.ensures`."""
        left = [node.name for node in after.module.graph.nodes if is_state_value(node)]
        return f"{', '.join(left)} still name a value" if left else None


def is_state_value(node: object) -> bool:
    """Whether a value is what a state_value gives."""
    return is_op(node, torch.ops.onetrans.state_value.default)
