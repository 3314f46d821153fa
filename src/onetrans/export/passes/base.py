"""The contract of a pass, and the runner: requires → call → ensures, one logged line each, failures by name."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from onetrans.errors import ExportError
from onetrans.export.program import Program

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Changed:
    """What a pass gives.

    Attributes:
        program: The new program; the given one is as it was.
        changed: Names of the nodes or weights that the pass removed, made or replaced.
    """

    program: Program
    changed: tuple[str, ...] = ()


class Pass(ABC):
    """A rewrite of a graph: a program in, a new one out.

    Attributes:
        name: What the pass is called in logs and errors: its file's name.
    """

    name: ClassVar[str]

    def requires(self, program: Program) -> str | None:
        """Says what the program lacks for this pass to be right; None where it lacks nothing."""
        return None

    @abstractmethod
    def call(self, program: Program) -> Changed:
        """Rewrites.

        Raises:
            ExportError: The program cannot be rewritten; why.
        """

    def ensures(self, before: Program, after: Program) -> str | None:
        """Says what is still wrong with the result; None where it is what this pass promises."""
        return None


@dataclass(frozen=True, kw_only=True)
class PassRun:
    """What became of a pass in a pipeline: its name, the program after it, and what it changed."""

    name: str
    program: Program
    changed: tuple[str, ...]


def run_passes(program: Program, passes: Sequence[Pass]) -> tuple[PassRun, ...]:
    """Runs passes one after the other, each with its precondition, its postcondition and the graph's soundness checked.

    Raises:
        ExportError: A pass refused the program, failed or broke it; names the pass and those that ran before it.
    """
    runs: list[PassRun] = []
    for one in passes:
        began = time.perf_counter()
        try:
            made = _checked(one, program)
        except Exception as error:
            before = ", ".join(run.name for run in runs) or "none"
            raise ExportError(f"pass {one.name}: {error} (passes before it: {before})") from error
        program = made.program
        runs.append(PassRun(name=one.name, program=program, changed=made.changed))
        milliseconds = 1e3 * (time.perf_counter() - began)
        log.info("pass %s: %d changed, %.0f ms", one.name, len(made.changed), milliseconds)
    return tuple(runs)


def _checked(one: Pass, program: Program) -> Changed:
    problem = one.requires(program)
    if problem is not None:
        raise ExportError(problem)
    made = one.call(program)
    problem = unsound(made.program) or one.ensures(program, made.program)
    if problem is not None:
        raise ExportError(f"afterwards {problem}")
    return made


def run_pass(program: Program, one: Pass) -> Program:
    """The program after one pass, checked as in `run_passes`."""
    return run_passes(program, (one,))[-1].program


def unsound(program: Program) -> str | None:
    """Says what no program may be: malformed, without fake values, or unlike its specs; None where it is sound."""
    try:
        program.module.graph.lint()
    except (RuntimeError, ValueError) as error:
        return f"the graph is malformed: {error}"
    placeholders, results = program.placeholders(), program.results()
    for kind, nodes, specs in (("input", placeholders, program.inputs), ("output", results, program.outputs)):
        if len(nodes) != len(specs):
            return f"there are {len(nodes)} {kind}s and {len(specs)} specs of them"
        for node, spec in zip(nodes, specs, strict=True):
            if node.meta.get("val") is None or node.meta["val"].dim() != len(spec.dims):
                return f"{kind} {spec.name} has not the {len(spec.dims)} dimensions that its spec states"
    for node in program.module.graph.nodes:
        if node.op == "call_function" and node.users and "val" not in node.meta:
            return f"{node.name} has no fake value"
    return None


def nodes_of(program: Program) -> list[fx.Node]:
    """The program's nodes, in order."""
    return list(program.module.graph.nodes)
