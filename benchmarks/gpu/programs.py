"""Programs to measure: captured and split as an export does it, then lowered to our kernels or left to references."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from benchmarks.gpu.cases import SLOT, SLOTS
from benchmarks.gpu.measure import Context, Sizes
from benchmarks.gpu.parity import Parity, Values, compare_programs
from benchmarks.gpu.timing import clear, set_aside
from onetrans.export.config import ExportConfig
from onetrans.export.inputs import capture_model, random_inputs
from onetrans.export.passes.keep_rows import keep_rows
from onetrans.export.program import Program
from onetrans.export.split import extract, split
from onetrans.kernels import (
    candidate_attention_reference,
    history_attention_reference,
    mixed_ffn_reference,
    mixed_linear_reference,
    take_rows_reference,
)
from onetrans.model.checkpoint import random_model

SEED = 0
KINDS = ("prefill", "append", "decode")
PAST = "past_"
REFERENCES: Mapping[str, Callable[..., Any]] = {
    "onetrans.history_attention.default": history_attention_reference,
    "onetrans.candidate_attention.default": candidate_attention_reference,
    "onetrans.mixed_linear.default": mixed_linear_reference,
    "onetrans.mixed_ffn.default": mixed_ffn_reference,
    "onetrans.take_rows.default": take_rows_reference,
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


def place(program: Program, device: torch.device, memory: dict[Any, torch.Tensor], *, double: bool = False) -> Program:
    """The program on a device, our captured ops by their references, sizes as Python reads them.

    Args:
        program: As captured, or lowered.
        device: Goal.
        memory: Weights that are there already, so that programs share them.
        double: Compute in float64 throughout.
    """

    def moved(value: Any) -> Any:
        if isinstance(value, torch.device):
            return device
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
            name = str(node.target)
            made.target = {**REFERENCES, **PLAIN}.get(name, node.target)
            if node.target is torch.sym_min:
                made.target = min
            made.args = fx.node.map_aggregate(made.args, moved)
            made.kwargs = fx.node.map_aggregate(made.kwargs, moved)
        copies[node] = made
    constants = {name: weight(value) for name, value in program.weights().items()}
    module = fx.GraphModule(constants, graph)
    return Program(module=module, inputs=program.inputs, outputs=program.outputs, ranges=program.ranges)


def launches(program: Program, *, only: str = "") -> int:
    """Kernels that one run of a lowered program launches, reckoned from its graph.

    Args:
        program: Its graph.
        only: What the names of the ops to count begin with.
    """
    total = 0
    for node in program.module.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem and str(node.target).startswith(only):
            stem = str(node.target).split(".")[1] if "." in str(node.target) else ""
            total += 0 if stem in NO_KERNEL or not stem else LAUNCHES.get(stem, 1)
    return total


@dataclass
class Built:
    """One model in one dtype, on the device.

    Attributes:
        sizes: What is measured of it.
        dtype: Of weights, activations and state.
        plain: `prefill`, `append`, `decode` and `whole` with references.
        gold: The same in float64.
        kernels: `prefill`, `append` and `decode` lowered to our kernels.
        launches: Of the lowered programs.
        kernel_launches: Those of our kernels alone.
        device: Where it lies.
    """

    sizes: Sizes
    dtype: torch.dtype
    plain: dict[str, Program]
    gold: dict[str, Program]
    kernels: dict[str, Program]
    launches: dict[str, int]
    kernel_launches: dict[str, int]
    device: torch.device

    def inputs(self, kind: str, *, events: int = 0, candidates: int = 0, start: int = 0) -> Values:
        """Random inputs of `prefill`, `append`, `decode` or `whole`, ids, lengths and features alone; one user."""
        config = self.sizes.config
        drawn = random_inputs(config, {"U": 1, "C": 1, "L": max(1, events)}, SEED)
        others = random_inputs(config, {"U": 1, "C": max(1, candidates), "L": 1}, SEED)  # the same for any history
        drawn |= {name: value for name, value in others.items() if name.startswith("candidate_")}
        drawn["history_start"] = torch.full((1,), start)
        wanted = {spec.name for spec in self.plain[kind].inputs}
        return {name: value.to(self.device) for name, value in drawn.items() if name in wanted}

    def slabs(self) -> Values:
        """Pools of states, full of NaN, and the user's slot."""
        config = self.sizes.config
        shape = (config.heads, config.head_dim)
        found = {}
        for layer in range(config.layers):
            for kind in "kv":
                size = (SLOTS, config.pyramid.capacities[layer], *shape)
                found[f"{kind}_state{layer}"] = torch.full(size, float("nan"), dtype=self.dtype, device=self.device)
        return {**found, "slots": torch.tensor([SLOT], device=self.device)}


def build(context: Context, model: str, dtype: str) -> Built:
    """Captures, splits and lowers a model; kept for later measures of the same model and dtype."""
    held = context.programs.get((model, dtype))
    if held is not None:
        return held
    if context.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        if free < total / 2:
            context.programs.clear()
            clear()
    context.progress(f"capturing {model} in {dtype}")
    sizes = context.sizes(model)
    which = getattr(torch, dtype)
    made = random_model(sizes.config, SEED).to(which).eval()
    whole, append = capture_model(made, ExportConfig())
    parts = split(whole)
    assert append is not None
    captured = {"prefill": parts.prefill, "decode": parts.decode, "whole": parts.whole}
    captured["append"] = keep_rows(extract(append, parts.prefill.outputs))[0]
    memory: dict[Any, torch.Tensor] = {}
    from onetrans.export.targets.triton.target import lower

    lowered = {kind: lower(captured[kind]) for kind in KINDS}
    found = Built(
        sizes=sizes,
        dtype=which,
        plain={kind: place(program, context.device, memory) for kind, program in captured.items()},
        gold={kind: place(captured[kind], context.device, memory, double=True) for kind in KINDS},
        kernels={kind: place(program, context.device, memory) for kind, program in lowered.items()},
        launches={kind: launches(program) for kind, program in lowered.items()},
        kernel_launches={kind: launches(program, only="onetrans_triton.") for kind, program in lowered.items()},
        device=context.device,
    )
    context.programs[model, dtype] = found
    set_aside()
    return found


def run(program: Program, values: Mapping[str, torch.Tensor]) -> Values:
    """One run on inputs by name; outputs by name."""
    return dict(zip(program.outputs, call(program, values)(), strict=True))


def call(program: Program, values: Mapping[str, torch.Tensor], module: Any = None) -> Callable[[], Any]:
    """A run on fixed inputs, to be called again and again.

    Args:
        program: Says in which order inputs go.
        values: By name.
        module: In place of the program's own, as compiled from it.
    """
    return functools.partial(program.module if module is None else module, *(values[s.name] for s in program.inputs))


def in_double(values: Mapping[str, torch.Tensor]) -> Values:
    """Floats in float64."""
    return {name: value.double() if value.is_floating_point() else value for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class Chain:
    """One user's state as a path leaves it: outputs of prefill by name, K and V of each layer cut to what is valid.

    Attributes:
        plain: By the references in the dtype.
        gold: In float64.
        ours: By our kernels, K and V in `slabs`.
        slabs: Our pools and the slot.
    """

    plain: Values
    gold: Values
    ours: Values
    slabs: Values


def prefilled(built: Built, events: int) -> Chain:
    """The state of a fresh history of so many events by all three ways."""
    given = built.inputs("prefill", events=events)
    slabs = built.slabs()
    plain, gold = run(built.plain["prefill"], given), run(built.gold["prefill"], given)
    ours = run(built.kernels["prefill"], {**given, **slabs})
    return Chain(plain=_cut(plain, plain), gold=_cut(gold, gold), ours=ours, slabs=slabs)


def _cut(values: Values, lengths: Values) -> Values:
    """K and V without padding rows."""
    return {
        name: value[:, : int(lengths["lengths"][0, int(name[1:])])] if is_window(name) else value
        for name, value in values.items()
    }


def is_window(name: str) -> bool:
    """Whether an output is a layer's K or V."""
    return name[0] in "kv" and name[1:].isdigit()


def from_slabs(chain_outputs: Values, slabs: Values, like: Values, first: Mapping[int, int]) -> Values:
    """Our outputs with K and V out of the slabs, of the tokens that `like` has, from token first[layer] on."""
    found = dict(chain_outputs)
    for name, value in like.items():
        if is_window(name):
            at = first.get(int(name[1:]), 0)
            found[name] = slabs[f"{name[0]}_state{name[1:]}"][SLOT : SLOT + 1, at : at + value.shape[1]]
    return found


def judge_prefill(built: Built, chain: Chain) -> Parity:
    """The state that our prefill leaves, against float64."""
    ours = from_slabs(chain.ours, chain.slabs, chain.gold, {})
    return compare_programs(ours, chain.plain, chain.gold, built.dtype)


def append_inputs(built: Built, state: Values) -> Values:
    """Inputs of the append as captured: the new events and the past."""
    sizes = built.sizes
    given = built.inputs("append", events=sizes.new, start=sizes.before)
    past = {f"{PAST}{name}": value.contiguous() for name, value in state.items() if is_window(name)}
    return {**given, **past}


def own_append_inputs(built: Built, chain: Chain) -> Values:
    """Inputs of the lowered append."""
    sizes = built.sizes
    return {**built.inputs("append", events=sizes.new, start=sizes.before), **chain.slabs}


def judge_append(built: Built, before: Chain, ours: Values) -> Parity:
    """What an append by our kernels leaves behind `before`, K and V of its new tokens in the slabs."""
    plain = run(built.plain["append"], append_inputs(built, before.plain))
    gold = run(built.gold["append"], append_inputs(built, before.gold))
    first = {layer: int(n) for layer, n in enumerate(before.gold["lengths"][0])}
    windows = {layer: int(n) - built.sizes.new for layer, n in enumerate(gold["lengths"][0])}
    assert first == windows, "the append is not exact: a window moved"
    return compare_programs(from_slabs(ours, before.slabs, gold, first), plain, gold, built.dtype)


def decode_inputs(built: Built, state: Values, candidates: int) -> Values:
    """Inputs of the captured decode: candidates and the state."""
    return {**built.inputs("decode", candidates=candidates), **{n: v.contiguous() for n, v in state.items()}}


def own_decode_inputs(built: Built, chain: Chain, candidates: int) -> Values:
    """Inputs of the lowered decode."""
    return {**built.inputs("decode", candidates=candidates), **chain.ours, **chain.slabs}
