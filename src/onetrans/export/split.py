"""The split: one captured graph into prefill (all that needs no candidate) and decode (the rest), along their cut."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from onetrans.errors import ExportError
from onetrans.export.passes.constant_folding import fold_constants
from onetrans.export.passes.dead_code import remove_dead_code
from onetrans.export.passes.partial_product import split_partial_products
from onetrans.export.program import Program
from onetrans.export.scope import HeldBack, NodeScope, analyse, held_back, is_size, state_name
from onetrans.export.subgraph import subgraph
from onetrans.spec import ROLES, Role, State, TensorSpec

log = logging.getLogger(__name__)

STATE_VALUE = "onetrans.state_value.default"
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


def prepare(program: Program) -> tuple[Program, dict[str, tuple[str, ...]]]:
    """Runs the passes; returns the program and what each did, `dead_weight` being the weights that no one reads."""
    weights = program.weights()
    done: dict[str, tuple[str, ...]] = {}
    for name, run in (
        ("dead_code", remove_dead_code),
        ("partial_product", split_partial_products),
        ("constant_folding", fold_constants),
    ):
        begin = time.perf_counter()
        program, done[name] = run(program)
        if name == "dead_code":
            done["dead_weight"] = tuple(sorted(set(weights) - set(program.weights())))
        log.info("pass %s: %d changed, %.0f ms", name, len(done[name]), 1e3 * (time.perf_counter() - begin))
    return _erase_names(program), done


def split(program: Program) -> Split:
    """Splits a captured program by scope.

    Raises:
        ExportError: No output depends on a candidate, or none on a user.
    """
    whole, done = prepare(program)
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
        dead=done["dead_code"],
        dead_weights=done["dead_weight"],
        folded=done["constant_folding"],
        partial_products=done["partial_product"],
        held_back=held_back(whole, scopes),
    )
    return Split(whole=whole, prefill=prefill, decode=decode, report=report)


def extract(program: Program, state: Sequence[TensorSpec]) -> Program:
    """The user-scope graph that computes a state in another program, as in an append.

    Raises:
        ExportError: The program does not compute one of the state's tensors.
    """
    whole, _ = prepare(program)
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
    while source.target in SELECTIONS and "state_name" not in source.meta:
        source = source.args[0]  # type: ignore[assignment]
    return source if "state_name" in source.meta else node


def _erase_names(program: Program) -> Program:
    graph = program.module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and str(node.target) == STATE_VALUE:
            source, name, role, layer, capacity = node.args
            source.meta["state_name"] = name
            if role in ROLES:
                source.meta["state"] = State(role=role, layer=layer, capacity=capacity)
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    program.module.recompile()
    return program
