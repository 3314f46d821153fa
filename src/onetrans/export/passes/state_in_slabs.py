"""Keys and values are read and written in a pool's slabs, instead of being taken and returned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from onetrans.errors import ExportError
from onetrans.export.arguments import arguments, is_op
from onetrans.export.passes.base import Changed, Pass
from onetrans.export.passes.dead_code import remove_dead_code
from onetrans.export.program import Program
from onetrans.export.rebuild import DROP, Builder, rebuild
from onetrans.export.scope import is_size
from onetrans.spec import Role, TensorSpec

aten = torch.ops.aten
HISTORY = torch.ops.onetrans.history_attention.default
CANDIDATES = torch.ops.onetrans.candidate_attention.default
LINEAR = torch.ops.onetrans.mixed_linear.default
INTO_STATE = torch.ops.onetrans.keys_into_state.default
SLOTS = "slots"


class StateInSlabs(Pass):
    """Gives the program its windows as inputs `slots` [U] and, per layer, slabs `k_state0`, `v_state0` [S, W, H, E].

    Prefill and append write the slabs in place and return the rest of the state; all read them in place, where past
    and new tokens are one sequence. Changed are the slabs.
    """

    name = "state_in_slabs"

    def requires(self, program: Program) -> str | None:
        """See `Pass.requires`."""
        if not _windows(program):
            return "the program has no windows of keys and values among its state"
        if any(spec.is_window for spec in program.outputs):
            lengths = _lengths(program)
            if lengths is None or not is_op(lengths, aten.add.Tensor):
                made = "not returned" if lengths is None else f"made by {lengths.target}"
                return f"the lengths of the windows are {made}; they must be the past's and the new tokens' sum"
        return None

    def call(self, program: Program) -> Changed:
        """See `Pass.call`."""
        rewrite = _Rewrite(program)
        kept = [spec for spec in program.outputs if not spec.is_window]
        changed = remove_dead_code(rebuild(program, rewrite.visit, outputs=kept))
        slabs = tuple(spec.name for spec in rewrite.slabs.values())
        taken = [spec for spec in program.inputs if spec.is_window]
        past = {n for n, spec in zip(changed.placeholders(), changed.inputs, strict=True) if spec in taken}
        for node in past:
            if node.users:
                raise ExportError(f"{node.name} is read by {next(iter(node.users)).name}, which is no attention")
        return Changed(program=rebuild(changed, lambda build, node: DROP if node in past else None), changed=slabs)

    def ensures(self, before: Program, after: Program) -> str | None:
        """See `Pass.ensures`."""
        loose = [spec.name for spec in after.outputs if spec.is_window]
        loose += [spec.name for spec in after.inputs if spec.is_window and spec.dims[0] != "S"]
        return f"{', '.join(loose)} still cross as tensors of their own" if loose else None


def _windows(program: Program) -> dict[fx.Node, TensorSpec]:
    """The nodes that hold keys and values of a layer: inputs, then outputs."""
    sides = ((program.placeholders(), program.inputs), (program.results(), program.outputs))
    return {n: spec for nodes, specs in sides for n, spec in zip(nodes, specs, strict=True) if spec.is_window}


def _lengths(program: Program) -> fx.Node | None:
    """The valid lengths of the windows [U, layers] that the program returns."""
    pairs = zip(program.results(), program.outputs, strict=True)
    return next((node for node, spec in pairs if spec.is_lengths), None)


@dataclass
class _Lengths:
    """Layers' parts [U] of lengths [U, layers]; each of these is turned once, so that its parts need no copy."""

    turned: dict[fx.Node, fx.Node] = field(default_factory=dict)
    parts: dict[fx.Node, tuple[fx.Node, int]] = field(default_factory=dict)

    def part(self, build: Builder, stack: fx.Node, layer: int) -> fx.Node:
        """A layer's part of a stack of the new graph."""
        if stack not in self.turned:
            self.turned[stack] = build.call(aten.contiguous.default, build.call(aten.t.default, stack))
        part = build.call(aten.select.int, self.turned[stack], 0, layer)
        self.parts[part] = (stack, layer)
        return part

    def stack(self, part: fx.Node, layer: int) -> fx.Node:
        """What `part` was taken of.

        Raises:
            ExportError: It is no part of the layer.
        """
        stack, found = self.parts.get(part, (part, None))
        if found != layer:
            raise ExportError(f"{part.name} is read as layer {layer}'s part of lengths [U, layers], and is not one")
        return stack


class _Rewrite:
    """The visitor, with what it has made so far."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.layer_of = {node: spec.state.layer for node, spec in _windows(program).items() if spec.state is not None}
        self.written = {spec.identity: n for n, spec in _windows(program).items() if spec in program.outputs}
        self.lengths = _lengths(program) if self.written else None
        self.projections = {
            _projection(node): int(layer) for (role, layer), node in self.written.items() if role == "key"
        }
        self.slabs: dict[tuple[Role, int | str], TensorSpec] = {}
        self._last_input = program.placeholders()[-1]
        self._made: dict[tuple[Role, int | str], fx.Node] = {}
        self._slots: fx.Node | None = None
        self._per_layer = _Lengths()
        self._first_queries: dict[tuple[fx.Node, fx.Node], fx.Node] = {}

    def visit(self, build: Builder, node: fx.Node) -> Any:
        """See `onetrans.export.rebuild.rebuild`."""
        if node is self._last_input:
            made = build.copy(node)
            self._add_inputs(build)
            return made
        if is_op(node, aten.select.int):
            given = arguments(node)
            if given["dim"] == 1 and _is_per_layer(given["self"]):
                return self._per_layer.part(build, build.new(given["self"]), given["index"])
        if node in self.projections:
            self._write(build, node, self.projections[node])
        if is_op(node, HISTORY):
            return self._read_history(build, node)
        return self._read_candidates(build, node) if is_op(node, CANDIDATES) else None

    def _add_inputs(self, build: Builder) -> None:
        program = self.program
        pairs = zip(program.placeholders(), program.inputs, strict=True)
        like = next(node.meta["val"] for node, spec in pairs if spec.dims[0] == "U")
        with build.fake:
            slots = torch.empty(like.shape[0], dtype=torch.int64, device=like.device)
        spec = TensorSpec(name=SLOTS, dtype="int64", dims=("U",), scope="user")
        self._slots = build.placeholder(spec, slots)
        for node, window in _windows(program).items():
            if window.identity not in self._made:
                spec, value = _slab(build, node, window)
                self.slabs[window.identity] = spec
                self._made[window.identity] = build.placeholder(spec, value)

    def _slab_of(self, role: Role, layer: int) -> fx.Node:
        return self._made[role, layer]

    def _stacks(self, build: Builder) -> tuple[fx.Node, fx.Node]:
        """Lengths of the past and of the new tokens, each [U, layers]."""
        assert self.lengths is not None
        given = arguments(self.lengths)
        return build.new(given["self"]), build.new(given["other"])

    def _write(self, build: Builder, node: fx.Node, layer: int) -> None:
        """Lets the projection to keys and values write the layer's slabs."""
        given = arguments(node)
        if given["activation"] is not None or given["residual"] is not None:
            raise ExportError(
                f"{node.name} is a projection with an activation or a residual; the kernel writes neither"
            )
        first, length = (self._per_layer.part(build, stack, layer) for stack in self._stacks(build))
        build.call(
            INTO_STATE,
            *build.new([given[name] for name in ("x", "w", "gain", "eps", "bias")]),
            self._slab_of("key", layer),
            self._slab_of("value", layer),
            self._slots,
            first,
            length,
        )

    def _read_history(self, build: Builder, node: fx.Node) -> fx.Node:
        given = arguments(node)
        layer = self.layer_of[given["k"]]
        assert layer is not None
        assert self.lengths is not None
        return build.copy(
            node,
            k=self._slab_of("key", layer),
            v=self._slab_of("value", layer),
            q_start=self._first_query(build, given, layer),
            length=self._per_layer.part(build, build.new(self.lengths), layer),
            past_k=None,
            past_v=None,
            past_length=None,
            slots=self._slots,
        )

    def _first_query(self, build: Builder, given: dict[str, Any], layer: int) -> fx.Node:
        """Where a layer's queries begin in its slab: past tokens, then `q_start` new ones; one sum for all layers."""
        past, new = self._stacks(build)
        length, q_start = build.new(given["length"]), build.new(given["q_start"])
        if self._per_layer.stack(length, layer) is not new:
            raise ExportError(f"layer {layer} attends to {length.name} new tokens, which are not those of the lengths")
        if is_op(q_start, aten.zeros_like.default):
            return self._per_layer.part(build, past, layer)
        wanted = (past, self._per_layer.stack(q_start, layer))
        if wanted not in self._first_queries:
            self._first_queries[wanted] = build.call(aten.add.Tensor, *wanted)
        return self._per_layer.part(build, self._first_queries[wanted], layer)

    def _read_candidates(self, build: Builder, node: fx.Node) -> fx.Node:
        given = arguments(node)
        others = [i for i, key in enumerate(given["keys"]) if key not in self.layer_of]
        (layer,) = {self.layer_of[key] for key in given["keys"] if key in self.layer_of}
        assert layer is not None
        if self.lengths is None:
            total = build.new(given["lengths"][-1])
        else:
            total = self._per_layer.part(build, build.new(self.lengths), layer)
        kept = {name: build.new([given[name][i] for i in others]) for name in ("keys", "values", "lengths")}
        return build.copy(
            node,
            keys=[*kept["keys"], self._slab_of("key", layer)],
            values=[*kept["values"], self._slab_of("value", layer)],
            lengths=[*kept["lengths"], total],
            slots=self._slots,
        )


def _slab(build: Builder, node: fx.Node, window: TensorSpec) -> tuple[TensorSpec, torch.Tensor]:
    """The slab of a window [U, W, H, E]. How many slots it has is the pool's choice; the fake one has two."""
    value = node.meta["val"]
    _, W, H, E = value.shape
    with build.fake:
        slab = torch.empty((2, W, H, E), dtype=value.dtype, device=value.device)
    role, layer = window.identity
    spec = TensorSpec(
        name=f"{role[0]}_state{layer}",
        dtype=window.dtype,
        dims=("S", f"W{layer}", int(H), int(E)),
        scope="user",
        state=window.state,
    )
    return spec, slab


def _projection(window: fx.Node) -> fx.Node:
    """The mixed_linear that a layer's keys are a part of.

    Raises:
        ExportError: They are none.
    """
    node = window
    while not is_op(node, LINEAR):
        sources = [source for source in node.all_input_nodes if not is_size(source)]
        if len(sources) != 1 or sources[0].op != "call_function":
            raise ExportError(f"{window.name} is not a mixed_linear's result cut in two, as the kernel writes it")
        node = sources[0]
    return node


def _is_per_layer(node: fx.Node) -> bool:
    value: torch.Tensor = node.meta["val"]
    return value.dtype == torch.int64 and value.dim() == 2
