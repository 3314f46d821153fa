"""The forward of an empty state out of the forward with a past: the attentions lose their segment of the past."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import onetrans.kernels  # noqa: F401  (registers the ops)
from onetrans.errors import ExportError
from onetrans.export.arguments import arguments, is_op
from onetrans.export.passes.base import Changed, Pass, nodes_of
from onetrans.export.passes.state_names import is_state_value
from onetrans.export.program import Program
from onetrans.export.rebuild import DROP, Builder, rebuild

HISTORY = torch.ops.onetrans.history_attention.default
CANDIDATES = torch.ops.onetrans.candidate_attention.default
SUBTRACT, SELECT = torch.ops.aten.sub.Tensor, torch.ops.aten.select.int


class DropPast(Pass):
    """Makes the program for a history that begins with the given events, where every past length is 0.

    Changed are the inputs that held the past.
    """

    name = "drop_past"

    def requires(self, program: Program) -> str | None:
        """See `Pass.requires`."""
        return None if _past(program) else "no input holds keys or values of a past"

    def call(self, program: Program) -> Changed:
        """See `Pass.call`.

        Raises:
            ExportError: Another op reads the past.
        """
        past = _past(program)

        def visit(build: Builder, node: fx.Node) -> Any:
            if is_op(node, HISTORY) and arguments(node)["past_k"] in past:
                return build.copy(node, past_k=None, past_v=None, past_length=None)
            if is_op(node, CANDIDATES):
                return build.copy(node, **build.new(_segments(node, past)))
            return build.new(arguments(node)["self"]) if _is_new_length(node) else None

        changed = rebuild(program, visit)
        gone = _unread(changed, {node.name for node in program.module.graph.nodes if node.users})
        names = tuple(node.name for node in _past(changed))
        return Changed(program=rebuild(changed, lambda build, node: DROP if node in gone else None), changed=names)

    def ensures(self, before: Program, after: Program) -> str | None:
        """See `Pass.ensures`."""
        return f"{', '.join(node.name for node in _past(after))} still hold a past" if _past(after) else None


def _past(program: Program) -> dict[fx.Node, None]:
    """The inputs that hold a state, in order."""
    pairs = zip(program.placeholders(), program.inputs, strict=True)
    return {node: None for node, spec in pairs if spec.state is not None}


def _segments(node: fx.Node, past: dict[fx.Node, None]) -> dict[str, list[fx.Node]]:
    """A candidate attention's segments without those of the past."""
    given = arguments(node)
    kept = [i for i, key in enumerate(given["keys"]) if key not in past]
    return {name: [given[name][i] for i in kept] for name in ("keys", "values", "lengths")}


def _is_new_length(node: fx.Node) -> bool:
    """Whether a node takes the past's tokens of a layer off its window's, which leaves the window where none are."""
    if not is_op(node, SUBTRACT):
        return False
    taken: Any = arguments(node)["other"]
    while is_op(taken, SELECT):
        taken = arguments(taken)["self"]
    return is_state_value(taken) and arguments(taken)["role"] == "past_lengths"


def _unread(program: Program, read_before: set[str]) -> set[fx.Node]:
    """The past, and what was computed for it alone: nodes that were read before and are not any more.

    Raises:
        ExportError: The past is still read.
    """
    gone: set[fx.Node] = set()
    past = _past(program)
    for node in reversed(nodes_of(program)):
        if node in past or (node.op == "call_function" and node.name in read_before):
            readers = [user for user in node.users if user not in gone]
            if not readers:
                gone.add(node)
            elif node in past:
                raise ExportError(f"{node.name} is read by {readers[0].name}, which is no attention")
    return gone
