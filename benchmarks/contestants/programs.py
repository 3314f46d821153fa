"""Programs to measure: captured and split as an export does it, then lowered to our kernels or left to references."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.contestants.kernels import SLOT, SLOTS
from benchmarks.context import SEED, Context, Sizes
from onetrans.bench.competition import Parity, Values, compare_programs
from onetrans.bench.timing import clear, set_aside
from onetrans.export.config import ExportConfig
from onetrans.export.execute import on_device, run
from onetrans.export.models.base import ModelAdapter, adapt
from onetrans.export.program import Program
from onetrans.export.programs import Programs, make_programs
from onetrans.model.checkpoint import random_model
from onetrans.precision import precision
from onetrans.spec import TensorSpec

KINDS = ("prefill", "append", "decode")


def programs_of(model: Any) -> tuple[ModelAdapter, Programs]:
    """A model's adapter and programs, within the bounds of an export."""
    adapter, config = adapt(model), ExportConfig()
    bounds = adapter.bounds(max_users=config.max_users, max_candidates=config.max_candidates)
    return adapter, make_programs(adapter, bounds)


def lower_to_kernels(programs: Mapping[str, Program]) -> dict[str, Program]:
    """Prefill, append and decode over the Triton kernels, state in slabs."""
    from onetrans.export.targets.triton import lower

    made = lower({kind: programs[kind] for kind in KINDS if kind in programs})
    return {kind: artifact.value for kind, artifact in made.items()}


def slab_name(spec: TensorSpec) -> str:
    """The lowered programs' name of the slab that holds a layer's keys or values."""
    assert spec.state is not None
    return f"{spec.state.role[0]}_state{spec.state.layer}"


@dataclass(frozen=True, kw_only=True)
class UserState:
    """One user's state after a prefill, by name: K and V of `plain` and `reference` (float64) cut to what is valid."""

    plain: Values
    reference: Values
    ours: Values  # what our kernels return; K and V lie in the slabs
    slabs: Values  # and the user's slot


@dataclass(frozen=True, kw_only=True)
class ModelPrograms:
    """One model in one dtype, on the device: `prefill`, `append` and `decode`, and `whole` of the plain ones."""

    sizes: Sizes
    dtype: torch.dtype
    device: str
    adapter: ModelAdapter
    plain: Mapping[str, Program]  # with the ops' references
    reference: Mapping[str, Program]  # the same in float64
    kernels: Mapping[str, Program]  # lowered to our kernels

    @property
    def windows(self) -> list[TensorSpec]:
        """Keys and values of every layer, as prefill gives them."""
        return [spec for spec in self.plain["prefill"].outputs if spec.is_window]

    @property
    def lengths(self) -> str:
        """Name of the windows' lengths."""
        return next(spec.name for spec in self.plain["prefill"].outputs if spec.is_lengths)

    def inputs(self, kind: str, *, events: int = 0, candidates: int = 0, start: int = 0) -> dict[str, torch.Tensor]:
        """Random inputs of a program, ids, lengths and features alone; one user, whose candidates fit any history."""
        specs = {spec.name: spec for spec in self.plain[kind].inputs if spec.state is None}
        user = self.adapter.example_inputs(SEED, {"U": 1, "C": 1, "L": max(1, events)})
        others = self.adapter.example_inputs(SEED, {"U": 1, "C": max(1, candidates), "L": 1})
        drawn = {name: (user if spec.scope == "user" else others)[name] for name, spec in specs.items()}
        if "history_start" in drawn:
            drawn["history_start"] = torch.full((1,), start)
        return {name: value.to(self.device) for name, value in drawn.items()}

    def slabs(self) -> dict[str, torch.Tensor]:
        """Pools of states, full of NaN, and the user's slot."""
        found = {"slots": torch.tensor([SLOT], device=self.device)}
        for spec in self.windows:
            shape = (SLOTS, *spec.shape_per_user)
            found[slab_name(spec)] = torch.full(shape, float("nan"), dtype=self.dtype, device=self.device)
        return found

    def prefilled(self, events: int) -> UserState:
        """The state of a fresh history of so many events."""
        given, slabs = self.inputs("prefill", events=events), self.slabs()
        plain, reference = run(self.plain["prefill"], given), run(self.reference["prefill"], given)
        ours = run(self.kernels["prefill"], {**given, **slabs})
        return UserState(plain=self.cut(plain), reference=self.cut(reference), ours=ours, slabs=slabs)

    def tokens(self, state: Values) -> dict[str, int]:
        """Valid tokens of each window."""
        return {spec.name: int(state[self.lengths][0, spec.state.layer]) for spec in self.windows}  # type: ignore[union-attr]

    def cut(self, state: Values) -> dict[str, torch.Tensor]:
        """A state without padding rows."""
        return {**state, **{name: state[name][:, :tokens] for name, tokens in self.tokens(state).items()}}

    def from_slabs(
        self, ours: Values, slabs: Values, like: Values, first: Mapping[str, int]
    ) -> dict[str, torch.Tensor]:
        """Our outputs with K and V out of the slabs, of as many tokens as `like` has, from token `first` on."""
        found = dict(ours)
        for spec in self.windows:
            at, count = first.get(spec.name, 0), like[spec.name].shape[1]
            found[spec.name] = slabs[slab_name(spec)][SLOT : SLOT + 1, at : at + count]
        return found

    def poison(self, slabs: Values, valid: Mapping[str, int]) -> None:
        """Fills the user's slot with NaN behind the valid tokens of each window."""
        for spec in self.windows:
            slabs[slab_name(spec)][SLOT, valid.get(spec.name, 0) :] = float("nan")

    def append_inputs(self, state: Values) -> dict[str, torch.Tensor]:
        """Inputs of the append as captured: the new events and the past."""
        kept = {spec.identity: state[spec.name].contiguous() for spec in self.windows}
        past = {s.name: kept[s.identity] for s in self.plain["append"].inputs if s.state is not None}
        return {**self.inputs("append", events=self.sizes.new, start=self.sizes.before), **past}

    def decode_inputs(self, state: Values, candidates: int) -> dict[str, torch.Tensor]:
        """Inputs of the captured decode: candidates and the state."""
        return {**self.inputs("decode", candidates=candidates), **{n: v.contiguous() for n, v in state.items()}}

    def judge_prefill(self, state: UserState, ours: Values) -> Parity:
        """The state that our prefill leaves, against float64."""
        found = self.from_slabs(ours, state.slabs, state.reference, {})
        return compare_programs(found, state.plain, state.reference, self.dtype)


def build(context: Context, model: str, dtype: str) -> ModelPrograms:
    """Captures, splits and lowers a model; kept for later measures of the same model and dtype."""
    if (model, dtype) in context.programs:
        return context.programs[model, dtype]  # type: ignore[no-any-return]
    if context.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        if free < total / 2:
            context.programs.clear()
            clear()
    context.progress(f"capturing {model} in {dtype}")
    sizes, which = context.sizes(model), precision(dtype).torch
    adapter, made = programs_of(random_model(sizes.config, SEED).to(which).eval())
    captured = {**made.by_name, "whole": made.split.whole}
    memory: dict[Any, torch.Tensor] = {}
    place = functools.partial(on_device, device=context.device, memory=memory)
    found = ModelPrograms(
        sizes=sizes,
        dtype=which,
        device=context.device,
        adapter=adapter,
        plain={kind: place(program) for kind, program in captured.items()},
        reference={kind: place(captured[kind], double=True) for kind in KINDS},
        kernels={kind: place(program) for kind, program in lower_to_kernels(captured).items()},
    )
    context.programs[model, dtype] = found
    set_aside()
    return found
