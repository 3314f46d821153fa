"""Programs to measure: captured and split as an export does it, then lowered to our kernels or left to references."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from benchmarks.contestants.kernels import OPS, SLOT, SLOTS
from benchmarks.context import SEED, Context, Sizes
from onetrans import kernels
from onetrans.bench.competition import Parity, Values, compare_programs
from onetrans.bench.timing import clear, set_aside
from onetrans.export.config import ExportConfig
from onetrans.export.models.base import ModelAdapter, adapt
from onetrans.export.program import Program
from onetrans.export.programs import Programs, make_programs
from onetrans.model.checkpoint import random_model
from onetrans.spec import TensorSpec

KINDS = ("prefill", "append", "decode")
REFERENCES: Mapping[str, Callable[..., Any]] = {
    f"onetrans.{op}.default": getattr(kernels, f"{op}_reference") for op in OPS
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
LAUNCHES = {"mixed_ffn": 2, "candidate_attention": 2}  # kernels of an op of ours, where not one
NO_KERNEL = (
    "view", "reshape", "unsqueeze", "squeeze", "select", "slice", "transpose", "permute", "chunk", "split", "expand",
    "flatten", "sym_size", "t", "unflatten", "detach", "alias",
)  # fmt: skip


def _size(x: torch.Tensor, axis: int) -> int:
    return x.shape[axis]


PLAIN = {"aten.sym_size.int": _size, "aten.sym_size": _size}  # what torch.compile cannot trace of a captured graph


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


def on_device(
    program: Program, device: torch.device | str, memory: dict[Any, torch.Tensor], *, double: bool = False
) -> Program:
    """The program on a device, our captured ops by their references, sizes as Python reads them.

    `memory` takes the weights that are there already, so that programs share them; `double` computes in float64.
    """

    def moved(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device(device)
        return torch.float64 if double and value in FLOATS else value

    def weight(value: torch.Tensor) -> torch.Tensor:
        which = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype, double)
        if which not in memory:
            wide = torch.float64 if double and value.is_floating_point() else value.dtype
            memory[which] = value.to(device=device, dtype=wide)
        return memory[which]

    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.module.graph.nodes:
        made = graph.node_copy(node, lambda n: copies[n])
        if node.op == "call_function":
            made.target = (
                min if node.target is torch.sym_min else {**REFERENCES, **PLAIN}.get(str(node.target), node.target)
            )
            made.args = fx.node.map_aggregate(made.args, moved)
            made.kwargs = fx.node.map_aggregate(made.kwargs, moved)
        copies[node] = made
    constants = {name: weight(value) for name, value in program.weights().items()}
    return dataclasses.replace(program, module=fx.GraphModule(constants, graph))


def launches(program: Program, *, only: str = "") -> int:
    """Kernels that a run of a lowered program launches, by its graph; of ops whose names begin with `only`."""
    total = 0
    for node in program.module.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem and str(node.target).startswith(only):
            stem = str(node.target).split(".")[1] if "." in str(node.target) else ""
            total += 0 if stem in NO_KERNEL or not stem else LAUNCHES.get(stem, 1)
    return total


def call(program: Program, values: Values, module: Any = None) -> Callable[[], Any]:
    """A run on fixed inputs, to be called again and again; by a module compiled from the program's own, if given."""
    return functools.partial(
        program.module if module is None else module, *(values[spec.name] for spec in program.inputs)
    )


def by_name(program: Program, made: Any) -> dict[str, torch.Tensor]:
    """What a program gives, by name."""
    return {spec.name: value for spec, value in zip(program.outputs, made, strict=True)}


def run(program: Program, values: Values) -> dict[str, torch.Tensor]:
    """One run on inputs by name; outputs by name."""
    return by_name(program, call(program, values)())


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
    sizes, which = context.sizes(model), getattr(torch, dtype)
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
