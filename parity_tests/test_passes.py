"""The contract of passes: pure, checked before and after, and named with those before them where they fail."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from onetrans.errors import ExportError
from onetrans.export.arguments import arguments, as_call
from onetrans.export.capture import capture_model
from onetrans.export.models.base import adapt
from onetrans.export.passes.base import Changed, Pass, run_pass, run_passes, unsound
from onetrans.export.passes.dead_code import DeadCode
from onetrans.export.passes.drop_past import DropPast
from onetrans.export.passes.keep_rows import KeepRows
from onetrans.export.passes.pipeline import DEFAULT
from onetrans.export.program import Program
from onetrans.export.rebuild import DROP, rebuild
from onetrans.export.split import extract, split
from onetrans.model.checkpoint import random_model
from parity_tests.configs import small_config

aten = torch.ops.aten


@pytest.fixture(scope="module")
def captured() -> tuple[Program, Program]:
    """The forward without and with a past."""
    adapter = adapt(random_model(small_config(), seed=3))
    whole, append = capture_model(adapter, adapter.bounds(max_users=64, max_candidates=2048))
    assert append is not None
    return whole, append


@pytest.fixture(scope="module")
def append_graph(captured: tuple[Program, Program]) -> Program:
    whole, append = captured
    return extract(append, split(whole).report.cut)


def printed(program: Program) -> str:
    """All that a program is: its graph, notes, weights and specs."""
    notes = [sorted((key, str(value)) for key, value in node.meta.items()) for node in program.module.graph.nodes]
    return f"{program.module.graph} {notes} {sorted(program.weights())} {program.inputs} {program.outputs}"


def test_a_pass_leaves_its_program_as_it_was(captured: tuple[Program, Program], append_graph: Program) -> None:
    whole, append = captured
    program = whole
    for one in DEFAULT:
        before = printed(program)
        made = run_pass(program, one)
        assert printed(program) == before, one.name
        assert printed(made) != before, one.name
        program = made
    for one, given in ((DropPast(), append), (KeepRows(), append_graph)):
        before = printed(given)
        assert printed(run_pass(given, one)) != before
        assert printed(given) == before, one.name


def test_a_second_run_changes_nothing(captured: tuple[Program, Program]) -> None:
    done = run_passes(captured[0], DEFAULT)[-1].program
    assert [run.changed for run in run_passes(done, DEFAULT)] == [()] * len(DEFAULT)


class Fails(Pass):
    name = "fails"

    def call(self, program: Program) -> Changed:
        raise KeyError("x")


class Refuses(Pass):
    name = "refuses"

    def requires(self, program: Program) -> str | None:
        return "the program is too long"

    def call(self, program: Program) -> Changed:
        raise AssertionError


class BreaksPromise(Pass):
    name = "breaks_promise"

    def call(self, program: Program) -> Changed:
        return Changed(program=program)

    def ensures(self, before: Program, after: Program) -> str | None:
        return "nothing is different"


class LosesAnInput(Pass):
    name = "loses_an_input"

    def call(self, program: Program) -> Changed:
        return Changed(program=dataclasses.replace(program, inputs=program.inputs[1:]))


class ForgetsValues(Pass):
    name = "forgets_values"

    def call(self, program: Program) -> Changed:
        made = rebuild(program, lambda build, node: None)
        next(node for node in made.module.graph.nodes if node.op == "call_function" and node.users).meta.pop("val")
        return Changed(program=made)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Fails(), r"^pass fails: 'x' \(passes before it: dead_code\)$"),
        (Refuses(), r"^pass refuses: the program is too long \(passes before it: dead_code\)$"),
        (BreaksPromise(), r"^pass breaks_promise: afterwards nothing is different \(passes"),
        (LosesAnInput(), r"^pass loses_an_input: afterwards there are \d+ inputs and \d+ specs of them"),
        (ForgetsValues(), r"^pass forgets_values: afterwards \w+ has no fake value"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_failure_names_the_pass_and_those_before_it(
    captured: tuple[Program, Program], broken: Pass, message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        run_passes(captured[0], (DeadCode(), broken, *DEFAULT))


def test_preconditions(captured: tuple[Program, Program]) -> None:
    for one, words in ((DropPast(), "no input holds keys or values"), (KeepRows(), "so that it is no append")):
        with pytest.raises(ExportError, match=f"^pass {one.name}: .*{words}.* \\(passes before it: none\\)$"):
            run_pass(captured[0], one)


def test_a_node_that_is_still_read_cannot_be_dropped(captured: tuple[Program, Program]) -> None:
    whole = captured[0]
    gone = next(node for node in whole.module.graph.nodes if node.op == "call_function" and node.users)
    with pytest.raises(ExportError, match=f"^{gone.name} is still read, and was dropped$"):
        rebuild(whole, lambda build, node: DROP if node is gone else None)


def test_a_copy_computes_the_same(captured: tuple[Program, Program]) -> None:
    whole = captured[0]
    made = rebuild(whole, lambda build, node: None, refresh=True)
    assert unsound(made) is None
    assert made.outputs == whole.outputs
    inputs = adapt(random_model(small_config(), seed=3)).example_inputs(0)
    values = [inputs[spec.name] for spec in whole.inputs]
    with torch.inference_mode():
        for one, other in zip(whole.module(*values), made.module(*values), strict=True):
            assert torch.equal(one, other)


def test_arguments_have_names_and_defaults(captured: tuple[Program, Program]) -> None:
    graph = captured[0].module.graph
    node = next(n for n in graph.nodes if n.target is torch.ops.onetrans.history_attention.default)
    given = arguments(node)
    assert list(given)[:5] == ["q", "k", "v", "q_start", "length"]
    assert (given["past_k"], given["slots"]) == (None, None)
    assert as_call(node.target, given) == (tuple(node.args[:5]), {})
    slots = graph.find_nodes(op="placeholder")[0]
    assert as_call(node.target, {**given, "slots": slots})[0][-4:] == (None, None, None, slots)
    with pytest.raises(ExportError, match="takes no widths"):
        as_call(node.target, {**given, "widths": 3})
    with pytest.raises(ExportError, match="or lacks q"):
        as_call(node.target, {name: value for name, value in given.items() if name != "q"})


def test_keyword_only_arguments_stay_keywords() -> None:
    assert as_call(aten.gelu.default, {"self": 1, "approximate": "tanh"}) == ((1,), {"approximate": "tanh"})
    assert as_call(aten.gelu.default, {"self": 1, "approximate": "none"}) == ((1,), {})
