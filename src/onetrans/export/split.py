"""The split: one captured graph into prefill (all that needs no candidate) and decode (the rest), along their cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from onetrans.errors import ExportError
from onetrans.export.arguments import arguments, is_op
from onetrans.export.passes.base import PassRun, run_passes
from onetrans.export.passes.pipeline import DEFAULT
from onetrans.export.program import Program
from onetrans.export.scope import HeldBack, NodeScope, analyse, held_back, is_size, state_name
from onetrans.export.subgraph import subgraph
from onetrans.spec import Role, State, TensorSpec

SELECTIONS = (torch.ops.aten.select.int, torch.ops.aten.slice.Tensor)


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What the split did.

    Attributes:
        nodes: Computations per scope.
        cut: The state.
        dead: Computations that fed nothing.
        dead_weights: Parameters that no graph reads any more.
        folded: Constants made of weights at export.
        partial_products: User-scope products taken out of linear(concat(user, candidate)).
        held_back: Candidate-scope values that read user-scope ones, and why.
    """

    nodes: dict[str, int]
    cut: tuple[TensorSpec, ...]
    dead: tuple[str, ...]
    dead_weights: tuple[str, ...]
    folded: tuple[str, ...]
    partial_products: tuple[str, ...]
    held_back: tuple[HeldBack, ...]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Both graphs of a program, and what lies between them."""

    whole: Program
    prefill: Program
    decode: Program
    report: SplitReport


def prepare(program: Program) -> tuple[PassRun, ...]:
    """Runs the default passes.

    Raises:
        ExportError: A pass refused the program or failed.
    """
    return run_passes(program, DEFAULT)


def split(program: Program) -> Split:
    """Splits a captured program by scope.

    Raises:
        ExportError: No output depends on a candidate, or none on a user.
    """
    runs = {run.name: run for run in prepare(program)}
    whole = runs[DEFAULT[-1].name].program
    scopes = analyse(whole)
    if any(scopes[node] != "candidate" for node in whole.results()):
        raise ExportError("an output depends on no candidate; every output of a ranking model must")
    cut = find_cut(whole, scopes)
    if not cut:
        raise ExportError("no user-scope value reaches the scores; check the scopes of the declared inputs")
    state = {node: _state_spec(whole, node) for node in cut}
    prefill = subgraph(whole, wanted=state)
    decode = subgraph(whole, wanted=dict(zip(whole.results(), whole.outputs, strict=True)), given=state)
    nodes = dict.fromkeys(("constant", "user", "candidate"), 0)
    for node in whole.module.graph.nodes:
        if node.op in ("call_function", "get_attr") and not is_size(node):
            nodes[scopes[node]] += 1
    report = SplitReport(
        nodes=nodes,
        cut=tuple(state.values()),
        dead=runs["dead_code"].changed,
        dead_weights=tuple(sorted(set(program.weights()) - set(runs["dead_code"].program.weights()))),
        folded=runs["constant_folding"].changed,
        partial_products=runs["partial_product"].changed,
        held_back=held_back(whole, scopes),
    )
    return Split(whole=whole, prefill=prefill, decode=decode, report=report)


def extract(program: Program, state: Sequence[TensorSpec]) -> Program:
    """The user-scope graph that computes a state in another program, as in an append.

    Raises:
        ExportError: The program does not compute one of the state's tensors.
    """
    whole = prepare(program)[-1].program
    scopes = analyse(whole)
    made: dict[tuple[Role, int | str], fx.Node] = {}
    for node in whole.module.graph.nodes:
        if scopes[node] == "user" and not is_size(node) and isinstance(node.meta.get("val"), torch.Tensor):
            made[identity(node)] = node
    missing = [spec.name for spec in state if spec.identity not in made]
    if missing:
        raise ExportError(f"the append graph does not compute {', '.join(missing)}, which decode reads")
    found = [made[spec.identity] for spec in state]
    return subgraph(whole, wanted={node: _state_spec(whole, node) for node in found})


def identity(node: fx.Node) -> tuple[Role, int | str]:
    """Which tensor of the state a user-scope value would be: `TensorSpec.identity`."""
    state: State = node.meta.get("state", State(role="other"))
    return (state.role, state_name(node) if state.layer is None else state.layer)


def _state_spec(program: Program, node: fx.Node) -> TensorSpec:
    return program.spec(node, state_name(node), "user", node.meta.get("state", State(role="other")))


def find_cut(program: Program, scopes: dict[fx.Node, NodeScope]) -> list[fx.Node]:
    """User-scope values that a candidate-scope computation reads; graph inputs reach decode by themselves.

    A selection from a named value crosses as that value, once, and is made in decode.
    """
    crossing = [
        _named_source(node)
        for node in program.module.graph.nodes
        if node.op != "placeholder"
        and scopes[node] == "user"
        and not is_size(node)
        and any(scopes[user] == "candidate" for user in node.users)
    ]
    return list(dict.fromkeys(crossing))


def _named_source(node: fx.Node) -> fx.Node:
    source = node
    while is_op(source, *SELECTIONS) and "state_name" not in source.meta:
        source = arguments(source)["self"]
    return source if "state_name" in source.meta else node
