"""Dense layers of tokenizers and heads become mixed_linear, together with what follows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import onetrans.kernels  # noqa: F401  (registers the ops)
from onetrans.export.arguments import arguments, is_op
from onetrans.export.passes.base import Changed, Pass
from onetrans.export.passes.dead_code import remove_dead_code
from onetrans.export.program import Program
from onetrans.export.rebuild import Builder, rebuild

aten = torch.ops.aten
MIXED_LINEAR = torch.ops.onetrans.mixed_linear.default
ACTIVATIONS = {aten.gelu.default: "gelu", aten.silu.default: "silu", aten.relu.default: "relu"}


@dataclass(frozen=True, kw_only=True)
class _Dense:
    """A linear and what follows it.

    Attributes:
        linear: The product.
        last: The last node that the kernel computes.
        activation: What is applied to the product.
        residual: What is added after that, of the same shape.
        positions: Token positions that the result is laid out by; 1 where it is not.
    """

    linear: fx.Node
    last: fx.Node
    activation: str | None = None
    residual: fx.Node | None = None
    positions: int = 1


class DenseToMixedLinear(Pass):
    """Makes linear(x, W, b) a mixed_linear over one position, whose rows do not depend on how many there are.

    An activation and a sum with a tensor of the same shape that follow go into the kernel; a result that is then laid
    out position by position, [B, P * D] as [P, B, D], is one of P positions to begin with. Changed are the linears.
    """

    name = "dense_to_mixed_linear"

    def call(self, program: Program) -> Changed:
        """See `Pass.call`."""
        found = {dense.last: dense for dense in map(_with_tail, _linears(program))}
        weights = program.weights()
        changed = rebuild(program, lambda build, node: _replace(build, found[node], weights) if node in found else None)
        return Changed(program=remove_dead_code(changed), changed=tuple(d.linear.name for d in found.values()))

    def ensures(self, before: Program, after: Program) -> str | None:
        """See `Pass.ensures`."""
        left = [node.name for node in _linears(after)]
        return f"{', '.join(left)} are still dense layers" if left else None


def _linears(program: Program) -> list[fx.Node]:
    graph = program.module.graph
    linears = [node for node in graph.nodes if is_op(node, aten.linear.default)]
    return [node for node in linears if arguments(node)["weight"].op == "get_attr"]


def _with_tail(linear: fx.Node) -> _Dense:
    last, activation, residual = linear, None, None
    while (user := _only_user(last)) is not None:
        if user.target in ACTIVATIONS and arguments(user).get("approximate", "none") == "none":
            if activation is not None or residual is not None:
                break
            last, activation = user, ACTIVATIONS[user.target]
        elif is_op(user, aten.add.Tensor) and residual is None and arguments(user)["alpha"] == 1:
            given = arguments(user)
            others = [x for x in (given["self"], given["other"]) if isinstance(x, fx.Node) and x is not last]
            if len(others) != 1 or not _alike(others[0], linear):
                break
            last, residual = user, others[0]
        else:
            break
    laid = None if residual is not None else _laid_out(last)
    if laid is not None:
        return _Dense(linear=linear, last=laid[0], activation=activation, positions=laid[1])
    return _Dense(linear=linear, last=last, activation=activation, residual=residual)


def _laid_out(node: fx.Node) -> tuple[fx.Node, int] | None:
    """Where [..., P * D] is turned into a contiguous [P, B, D], and P."""
    viewed = _only_user(node)
    turned = _only_user(viewed) if viewed is not None and is_op(viewed, aten.view.default) else None
    if viewed is None or turned is None or not is_op(turned, aten.transpose.int):
        return None
    axes, laid = arguments(turned), _only_user(turned)
    if {axes["dim0"], axes["dim1"]} != {0, 1} or laid is None or not is_op(laid, aten.contiguous.default):
        return None
    shape, columns = viewed.meta["val"].shape, node.meta["val"].shape[-1]
    return (laid, int(shape[1])) if len(shape) == 3 and shape[1] * shape[2] == columns else None


def _replace(build: Builder, dense: _Dense, weights: dict[str, torch.Tensor]) -> fx.Node:
    given = arguments(dense.linear)
    source, matrix, P = given["input"], str(given["weight"].target), dense.positions
    stem, weight = matrix.replace(".", "_"), weights[matrix]
    F, D = weight.shape
    columns = weight.view(P, F // P, D).transpose(1, 2).contiguous()
    bias = None
    if given["bias"] is not None:
        row = weights[str(given["bias"].target)].view(P, F // P)
        bias = build.constant(f"{stem}_row", row)
    x = build.new(source)
    flat = build.call(aten.reshape.default, x, [1, -1, D])
    if P > 1:
        flat = build.call(aten.expand.default, flat, [P, -1, -1])
    residual = None
    if dense.residual is not None:
        residual = build.call(aten.reshape.default, build.new(dense.residual), [1, -1, F])
    w = build.constant(f"{stem}_columns", columns)
    made = build.call(MIXED_LINEAR, flat, w, None, 1e-6, bias, residual, dense.activation)
    if P > 1:
        return made
    shape = source.meta["val"].shape[:-1]
    sizes: list[Any] = [
        size if isinstance(size, int) else build.call(aten.sym_size.int, x, axis) for axis, size in enumerate(shape)
    ]
    return build.call(aten.view.default, made, [*sizes, F])


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two tensors have the same dtype and shape, whatever the dynamic sizes."""
    values = [node.meta["val"] for node in (one, other)]
    return len({(value.dtype, *map(str, value.shape)) for value in values}) == 1


def _only_user(node: fx.Node) -> fx.Node | None:
    """What reads a value, where it is read once."""
    return next(iter(node.users)) if len(node.users) == 1 else None
