"""The perturbation probe: runs every fresh split and sees that its state depends on the user and on nothing else."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from onetrans.errors import ExportError
from onetrans.export.program import Program
from onetrans.export.scope import analyse, state_name
from onetrans.export.split import Split, find_cut

Values = Mapping[str, torch.Tensor]


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, program: Program, wanted: Mapping[fx.Node, str]) -> None:
        super().__init__(program.module, garbage_collect_values=False)
        self.wanted = wanted
        self.seen: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n in self.wanted:
            self.seen[self.wanted[n]] = value
        return value


def probe_split(split: Split, users: tuple[Values, Values], candidates: tuple[Values, Values]) -> None:
    """Checks a split on the whole captured graph.

    Other candidates must leave every state tensor bit-equal, another user must change it (tensors of one whole number
    aside, such as a length that no history changes), and prefill then decode must give what the whole graph gives.

    Args:
        split: What to check.
        users: User-scope inputs by name, of two users who differ in every event, feature and in history length.
        candidates: Candidate-scope inputs by name, of two requests that differ in every feature.

    Raises:
        ExportError: A state tensor depends on a candidate or not on the user, or the parts differ from the whole.
    """
    (user_a, user_b), (candidates_a, candidates_b) = users, candidates
    state, scores = _run_whole(split, {**user_a, **candidates_a})
    state_b, scores_b = _run_whole(split, {**user_a, **candidates_b})
    changed, _ = _run_whole(split, {**user_b, **candidates_a})
    for name, value in state.items():
        if not torch.equal(value, state_b[name]):
            raise ExportError(f"state {name} changes with the candidates; its scope analysis is wrong")
        if not _is_constant(value) and value.shape == changed[name].shape and torch.equal(value, changed[name]):
            raise ExportError(f"state {name} is the same for another user; it does not belong in the state")
    if all(torch.equal(a, b) for a, b in zip(scores, scores_b, strict=True)):
        raise ExportError("the scores do not change with the candidates; check the declared scopes")
    inputs = {**user_a, **candidates_a}
    with torch.inference_mode():
        made = split.prefill.module(*(inputs[spec.name] for spec in split.prefill.inputs))
        parts = {spec.name: value for spec, value in zip(split.prefill.outputs, made, strict=True)}
        found = split.decode.module(*({**inputs, **parts}[spec.name] for spec in split.decode.inputs))
    for spec, whole, part in zip(split.decode.outputs, scores, found, strict=True):
        if not torch.equal(whole, part):
            raise ExportError(f"prefill and decode give another {spec.name} than the whole graph")


def _is_constant(value: torch.Tensor) -> bool:
    """Whether a value is one whole number throughout, as a length that no history changes."""
    return not value.is_floating_point() and value.numel() > 0 and bool((value == value.flatten()[0]).all())


def _run_whole(split: Split, inputs: Values) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    wanted = {node: state_name(node) for node in find_cut(split.whole, analyse(split.whole))}
    recorder = _Recorder(split.whole, wanted)
    with torch.inference_mode():
        scores = recorder.run(*(inputs[spec.name] for spec in split.whole.inputs))
    return recorder.seen, list(scores)
