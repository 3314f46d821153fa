"""The forward of an empty state out of the forward with a past: the attentions lose their segment of the past."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch
from torch import fx

from onetrans.errors import ExportError
from onetrans.export.program import Program

HISTORY_PAST = slice(5, 8)  # past_k, past_v, past_length of onetrans.history_attention
SEGMENTS = slice(3, 6)  # keys, values, lengths of onetrans.candidate_attention
PAST_LENGTHS = "past_lengths"  # a `state_value`: tokens of the past that each layer sees


def drop_past(program: Program, past: Collection[str]) -> Program:
    """The program for a history that begins with the given events, where every past length is 0.

    Args:
        program: A capture with a past, as yet without any pass.
        past: Names of the inputs that hold it.

    Raises:
        ExportError: Another op reads the past.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.module.graph.nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        copies[node].meta = dict(node.meta)
    gone = {copies[node] for node in program.placeholders() if node.target in past}
    loose: set[fx.Node] = set()
    for node in list(graph.nodes):
        before = set(node.all_input_nodes)
        if str(node.target) == "onetrans.history_attention.default":
            if len(node.args) > HISTORY_PAST.start and node.args[HISTORY_PAST.start] in gone:
                node.args = node.args[: HISTORY_PAST.start]
        elif str(node.target) == "onetrans.candidate_attention.default":
            kept = [i for i, key in enumerate(node.args[SEGMENTS.start]) if key not in gone]
            segments = [[part[i] for i in kept] for part in node.args[SEGMENTS]]
            node.args = (*node.args[: SEGMENTS.start], *segments, *node.args[SEGMENTS.stop :])
        elif node.target is torch.ops.aten.sub.Tensor and _is_past_length(node.args[1]):
            node.replace_all_uses_with(node.args[0])
            loose.add(node)
        loose |= before - set(node.all_input_nodes)
    _erase(graph, loose)
    for node in gone:
        if node.users:
            raise ExportError(f"{node.name} is read by {next(iter(node.users)).name}, which is no attention")
        graph.erase_node(node)
    return dataclasses.replace(
        program,
        module=fx.GraphModule(program.module, graph),
        inputs=tuple(spec for spec in program.inputs if spec.name not in past),
    )


def _is_past_length(node: fx.node.Argument) -> bool:
    while isinstance(node, fx.Node) and node.target is torch.ops.aten.select.int:
        node = node.args[0]
    return (
        isinstance(node, fx.Node)
        and str(node.target) == "onetrans.state_value.default"
        and node.args[1] == PAST_LENGTHS
    )


def _erase(graph: fx.Graph, nodes: set[fx.Node]) -> None:
    """Erases what nothing reads any more, and what was made for it alone."""
    pending = {node for node in nodes if node.op == "call_function"}
    while loose := {node for node in pending if not node.users}:
        for node in loose:
            pending |= {source for source in node.all_input_nodes if source.op == "call_function"}
            graph.erase_node(node)
        pending -= loose
