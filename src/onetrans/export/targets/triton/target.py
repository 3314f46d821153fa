"""Lowers a program to the Triton kernels: state in slabs, and every product by a kernel that no row's company sways."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch import fx

import onetrans.kernels.candidate_attention.kernel
import onetrans.kernels.history_attention.kernel
import onetrans.kernels.history_attention.rows
import onetrans.kernels.mixed_ffn.kernel
import onetrans.kernels.mixed_linear.kernel  # noqa: F401  (these register the ops)
from onetrans.errors import ExportError
from onetrans.export.passes.dead_code import remove_dead_code
from onetrans.export.passes.keep_rows import selected_from
from onetrans.export.program import Program
from onetrans.export.targets.triton.linears import linears_as_kernels
from onetrans.export.targets.triton.nodes import call, copied
from onetrans.precision import of_torch
from onetrans.spec import TensorSpec

aten = torch.ops.aten
SLOTS = "slots"
HISTORY, CANDIDATES, LINEAR = (
    f"onetrans.{op}.default" for op in ("history_attention", "candidate_attention", "mixed_linear")
)
KERNELS = ("history_attention", "candidate_attention", "mixed_linear", "mixed_ffn", "keys_into_state")
PROJECTION_DEFAULTS = (None, None, None, 1e-6, None, None, None)  # of mixed_linear: x, w, gain, eps, bias, then …
WINDOW = re.compile(r"[kv]\d+")


def lower(program: Program) -> Program:
    """A prefill, append or decode program over the Triton kernels.

    Its keys and values live in slabs: inputs `slots` [U] int64, and k_state{l} and v_state{l} [slots, W, H, E] for
    each layer. Prefill and append write them in place and return the rest of the state; all read them in place.
    Dense layers of tokenizers and heads become mixed_linear too; see `linears_as_kernels`.

    Args:
        program: Of `onetrans.export.split`, constants folded; in the dtype it is to run in.

    Raises:
        ExportError: The program is not one that keeps its state in windows.
    """
    program = _state_in_slabs(_queried_rows(linears_as_kernels(copied(program))))
    graph = program.module.graph
    for node in list(graph.nodes):
        stem = str(node.target).removeprefix("onetrans.").removesuffix(".default")
        if stem in KERNELS and str(node.target).startswith("onetrans."):
            node.target = getattr(torch.ops.onetrans_triton, stem).default
            for index, argument in enumerate(node.args):
                if stem == "candidate_attention" and index < 3:
                    node.update_arg(index, _uncopied(argument))
    return remove_dead_code(program)


def _queried_rows(program: Program) -> Program:
    """The pyramid's choice of rows in one launch."""
    for node in list(program.module.graph.nodes):
        source = selected_from(node)
        if source is not None:
            index = node.args[0].args[2].args[0]  # flatten(clamp(start[:, None] + arange) + user · N)
            start = index.args[0].args[0].args[0].args[0]
            rows = node.args[1][1]
            node.target, node.args = torch.ops.onetrans_triton.queried_rows.default, (source, start, rows)
    return program


class _Layers:
    """Layers' parts [U] of lengths [U, layers]; each of these is turned once, so that its parts need no copy."""

    def __init__(self) -> None:
        self._turned: dict[fx.Node, fx.Node] = {}
        self._parts: dict[fx.Node, tuple[fx.Node, int]] = {}

    def part(self, place: fx.Node, stack: fx.Node, layer: int) -> fx.Node:
        """A layer's part, read before `place`."""
        if stack not in self._turned:
            after = stack.next
            while after.op == "placeholder":
                after = after.next
            self._turned[stack] = call(after, aten.contiguous.default, call(after, aten.t.default, stack))
        part = call(place, aten.select.int, self._turned[stack], 0, layer)
        self._parts[part] = (stack, layer)
        return part

    def stack(self, part: fx.Node, layer: int) -> fx.Node:
        """What `part` was taken of.

        Raises:
            ExportError: It is no part of the layer.
        """
        stack, found = self._parts.get(part, (part, None))
        if found != layer:
            raise ExportError(f"{part.name} is read as layer {layer}'s part of lengths [U, layers], and is not one")
        return stack

    def take_apart(self, program: Program) -> None:
        """Turns whatever a layer's part is taken of."""
        for node in list(program.module.graph.nodes):
            if node.target is aten.select.int and node.args[1] == 1 and _is_per_layer(node.args[0]):
                node.replace_all_uses_with(self.part(node, node.args[0], node.args[2]))


def _is_per_layer(node: Any) -> bool:
    value: torch.Tensor = node.meta["val"]
    return value.dtype == torch.int64 and value.dim() == 2


def _state_in_slabs(program: Program) -> Program:
    """Reads and writes the windows of K and V in slabs instead of taking and returning them."""
    layers = _Layers()
    layers.take_apart(program)
    results = {spec.name: node for spec, node in zip(program.outputs, program.results(), strict=True)}
    given = {spec.name: node for spec, node in zip(program.inputs, program.placeholders(), strict=True)}
    written = {name: node for name, node in results.items() if WINDOW.fullmatch(name)}
    read = {name: node for name, node in given.items() if WINDOW.fullmatch(name.removeprefix("past_"))}
    if not written and not read:
        raise ExportError("the program has no windows of keys and values (k0, v0, …) among its state")
    windows = {name.removeprefix("past_"): node for name, node in {**read, **written}.items()}
    inputs = {SLOTS: (_user_vector(program), TensorSpec(name=SLOTS, dtype="int64", dims=("U",), scope="user"))}
    for name, window in windows.items():
        inputs[name] = _slab(name, window)
    added = {name: _placeholder(program, spec.name, value) for name, (value, spec) in inputs.items()}
    slots = added.pop(SLOTS)
    layer_of = {node: int(name.removeprefix("past_")[1:]) for name, node in {**read, **written}.items()}
    lengths = results["lengths"] if written else None
    if lengths is not None:
        _write(written, layers, lengths, added, slots, layer_of)
    _read(program, layers, added, slots, layer_of, lengths)
    kept = {name: node for name, node in results.items() if name not in written}
    (output,) = (node for node in program.module.graph.nodes if node.op == "output")
    output.args = (tuple(kept.values()),)
    outputs = tuple(spec for spec in program.outputs if spec.name in kept)
    specs = (*program.inputs, *(spec for _, spec in inputs.values()))
    program = remove_dead_code(dataclasses.replace(program, inputs=specs, outputs=outputs))
    for node, spec in zip(program.placeholders(), program.inputs, strict=True):
        if spec.name in read:
            if node.users:
                raise ExportError(f"{spec.name} is read by {next(iter(node.users)).name}, which is no attention")
            program.module.graph.erase_node(node)
    program.module.graph.lint()
    program.module.recompile()
    return dataclasses.replace(program, inputs=tuple(spec for spec in specs if spec.name not in read))


def _user_vector(program: Program) -> torch.Tensor:
    """A fake [U] int64."""
    like = next(n.meta["val"] for n, s in zip(program.placeholders(), program.inputs, strict=True) if s.dims[0] == "U")
    with like.fake_mode:
        return torch.empty(like.shape[0], dtype=torch.int64, device=like.device)


def _slab(name: str, window: fx.Node) -> tuple[torch.Tensor, TensorSpec]:
    """The slab of a window [U, W, H, E]. How many slots it has is the pool's affair; the fake one has two."""
    value = window.meta["val"]
    _, W, H, E = value.shape
    with value.fake_mode:
        slab = torch.empty((2, W, H, E), dtype=value.dtype, device=value.device)
    return slab, TensorSpec(
        name=f"{name[0]}_state{name[1:]}",
        dtype=of_torch(value.dtype).name,
        dims=("S", f"W{name[1:]}", int(H), int(E)),
        scope="user",
    )


def _placeholder(program: Program, name: str, value: torch.Tensor) -> fx.Node:
    graph = program.module.graph
    last = program.placeholders()[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.meta["val"] = value
    return node


def _write(
    written: dict[str, fx.Node],
    layers: _Layers,
    lengths: fx.Node,
    slabs: dict[str, fx.Node],
    slots: fx.Node,
    layer_of: dict[fx.Node, int],
) -> None:
    """Puts keys_into_state in the place of every projection to keys and values."""
    stacks = [stack for stack in lengths.args if isinstance(stack, fx.Node)]
    if lengths.target is not aten.add.Tensor or len(stacks) != 2:
        raise ExportError(f"lengths is made by {lengths.target}; it must be the past's and the new tokens' sum")
    for name, window in written.items():
        if name.startswith("k"):
            layer, projection = layer_of[window], window
            while str(projection.target) != LINEAR:
                source = projection.args[0]
                if not isinstance(source, fx.Node) or source.op != "call_function":
                    raise ExportError(f"{name} is not a mixed_linear's result cut in two, as the kernel writes it")
                projection = source
            arguments: list[Any] = [*projection.args, *PROJECTION_DEFAULTS[len(projection.args) :]]
            if any(argument is not None for argument in (arguments.pop(), arguments.pop())):
                raise ExportError(f"{name} is a projection with an activation or a residual; the kernel writes neither")
            state: list[Any] = [slabs[name], slabs[f"v{name[1:]}"], slots]
            state += [layers.part(projection, stack, layer) for stack in stacks]
            call(projection, torch.ops.onetrans.keys_into_state.default, *arguments, *state)


def _read(
    program: Program,
    layers: _Layers,
    slabs: dict[str, fx.Node],
    slots: fx.Node,
    layer_of: dict[fx.Node, int],
    lengths: fx.Node | None,
) -> None:
    """Lets the attentions read the slabs, which hold past and new tokens as one sequence.

    Args:
        program: Changed in place.
        layers: Give layers' parts of lengths.
        slabs: By name, as k0.
        slots: [U].
        layer_of: Of every window that is an input or a result.
        lengths: [U, layers], the sum of past and new tokens where the program writes windows.
    """
    for node in program.module.graph.nodes:
        if str(node.target) == HISTORY:
            assert lengths is not None
            q, k, _, q_start, length = node.args[:5]
            layer = layer_of[k]
            first = _first_query(node, layers, lengths, q_start, length, layer)
            total = layers.part(node, lengths, layer)
            node.args = (q, slabs[f"k{layer}"], slabs[f"v{layer}"], first, total, None, None, None, slots)
        elif str(node.target) == CANDIDATES:
            q, k, v, keys, values, read = node.args[:6]
            others = [i for i, key in enumerate(keys) if key not in layer_of]
            (layer,) = {layer_of[key] for key in keys if key in layer_of}
            total = read[-1] if lengths is None else layers.part(node, lengths, layer)
            node.args = (
                q,
                k,
                v,
                [*(keys[i] for i in others), slabs[f"k{layer}"]],
                [*(values[i] for i in others), slabs[f"v{layer}"]],
                [*(read[i] for i in others), total],
                slots,
            )


def _first_query(
    place: fx.Node, layers: _Layers, lengths: fx.Node, q_start: fx.Node, length: fx.Node, layer: int
) -> fx.Node:
    """Where a layer's queries begin in its slab: past tokens, then `q_start` new ones; one sum for all layers."""
    past, new = lengths.args
    assert isinstance(past, fx.Node)
    if layers.stack(length, layer) is not new:
        raise ExportError(f"layer {layer} attends to {length.name} new tokens, which are not those of lengths")
    if q_start.target is aten.zeros_like.default:
        return layers.part(place, past, layer)
    wanted = (past, layers.stack(q_start, layer))
    sums = (user for user in past.users if user.target is aten.add.Tensor and user.args == wanted)
    return layers.part(place, next(sums, None) or call(place, aten.add.Tensor, *wanted), layer)


def _uncopied(x: fx.Node) -> fx.Node:
    """What a contiguous() copied: the kernel reads parts of wider rows as they lie."""
    source = x.args[0] if x.target is aten.contiguous.default else x
    assert isinstance(source, fx.Node)
    return source
