"""The split: one captured graph into prefill (all that needs no candidate) and decode (the rest), along their cut."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch
from torch import fx

from onetrans.errors import ExportError
from onetrans.export.passes.constant_folding import fold_constants
from onetrans.export.passes.dead_code import remove_dead_code
from onetrans.export.passes.partial_product import split_partial_products
from onetrans.export.program import Program
from onetrans.export.scope import HeldBack, NodeScope, analyse, held_back, is_size, state_name
from onetrans.export.subgraph import subgraph, tensor_spec
from onetrans.features.encode import TensorSpec

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
    names = {node: state_name(node) for node in cut}
    prefill = subgraph(whole, wanted=cut, outputs=tuple(names.values()), given={})
    decode = subgraph(whole, wanted=whole.results(), outputs=whole.outputs, given=names)
    nodes = dict.fromkeys(("constant", "user", "candidate"), 0)
    for node in whole.module.graph.nodes:
        if node.op in ("call_function", "get_attr") and not is_size(node):
            nodes[scopes[node]] += 1
    report = SplitReport(
        nodes=nodes,
        cut=tuple(tensor_spec(whole, node, name) for node, name in names.items()),
        dead=done["dead_code"],
        dead_weights=done["dead_weight"],
        folded=done["constant_folding"],
        partial_products=done["partial_product"],
        held_back=held_back(whole, scopes),
    )
    return Split(whole=whole, prefill=prefill, decode=decode, report=report)


def extract(program: Program, names: tuple[str, ...]) -> Program:
    """The user-scope graph that computes the named state values of a program, as in an append.

    Raises:
        ExportError: A name is not a user-scope value of the program.
    """
    whole, _ = prepare(program)
    scopes = analyse(whole)
    by_name = {state_name(node): node for node in whole.module.graph.nodes if scopes[node] == "user"}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise ExportError(f"the append graph does not compute {', '.join(missing)}, which decode reads")
    return subgraph(whole, wanted=[by_name[name] for name in names], outputs=names, given={})


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
            source, name = node.args
            source.meta["state_name"] = name
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    program.module.recompile()
    return program
