"""Dense layers of tokenizers and heads as mixed_linear, with what follows them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from onetrans.export.passes.dead_code import remove_dead_code
from onetrans.export.program import Program
from onetrans.export.targets.triton.nodes import alike, call, constant, only_user, sizes

aten = torch.ops.aten
ACTIVATIONS = {aten.gelu.default: "gelu", aten.silu.default: "silu", aten.relu.default: "relu"}


def linears_as_kernels(program: Program) -> Program:
    """linear(x, W, b) as mixed_linear over one position, whose rows do not depend on their number as a library's do.

    An activation and a sum with a tensor of the same shape that follow go into the kernel; a result that is then laid
    out position by position, [B, P * D] as [P, B, D], is one of P positions to begin with.
    """
    for node in list(program.module.graph.nodes):
        if node.target is aten.linear.default and node.args[1].op == "get_attr":
            _replace(program, node)
    return remove_dead_code(program)


@dataclass(frozen=True)
class _Tail:
    """What follows a product: its last node, and what the nodes up to it do."""

    last: fx.Node
    activation: str | None = None
    residual: fx.Node | None = None


def _tail(node: fx.Node) -> _Tail:
    found = _Tail(last=node)
    while (user := only_user(found.last)) is not None:
        if user.target in ACTIVATIONS and user.kwargs.get("approximate", "none") == "none":
            if found.activation is not None or found.residual is not None:
                break
            found = _Tail(last=user, activation=ACTIVATIONS[user.target])
        elif user.target is aten.add.Tensor and not user.kwargs and found.residual is None:
            others = [arg for arg in user.args if isinstance(arg, fx.Node) and arg is not found.last]
            if len(others) != 1 or not alike(others[0], node):
                break
            found = _Tail(last=user, activation=found.activation, residual=others[0])
        else:
            break
    return found


def _replace(program: Program, node: fx.Node) -> None:
    tail = _tail(node)
    apart = _apart(tail)
    place = tail.last if apart is None else apart[0]
    x, matrix, *rest = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(matrix, fx.Node)
    weights, stem = program.weights(), str(matrix.target).replace(".", "_")
    weight = weights[str(matrix.target)]
    F, D = weight.shape
    P = 1 if apart is None else apart[1]
    w = constant(place, program, f"{stem}_columns", weight.view(P, F // P, D).transpose(1, 2).contiguous())
    bias = None
    if rest and isinstance(rest[0], fx.Node):
        bias = constant(place, program, f"{stem}_row", weights[str(rest[0].target)].view(P, F // P))
    flat = call(place, aten.reshape.default, x, [1, -1, D])
    if P > 1:
        flat = call(place, aten.expand.default, flat, [P, -1, -1])
    residual = tail.residual and call(place, aten.reshape.default, tail.residual, [1, -1, F])
    made = call(place, torch.ops.onetrans.mixed_linear.default, flat, w, None, 1e-6, bias, residual, tail.activation)
    if apart is None:
        made = call(place, aten.view.default, made, [*sizes(place, x, range(x.meta["val"].dim() - 1)), F])
    place.replace_all_uses_with(made)


def _apart(tail: _Tail) -> tuple[fx.Node, int] | None:
    """Where [..., P * D] is turned into a contiguous [P, B, D], and P."""
    viewed = only_user(tail.last)
    if tail.residual is not None or viewed is None or viewed.target is not aten.view.default:
        return None
    turned = only_user(viewed)
    if turned is None or turned.target is not aten.transpose.int or set(turned.args[1:]) != {0, 1}:
        return None
    laid = only_user(turned)
    if laid is None or laid.target is not aten.contiguous.default:
        return None
    shape, columns = viewed.meta["val"].shape, tail.last.meta["val"].shape[-1]
    return (laid, int(shape[1])) if len(shape) == 3 and shape[1] * shape[2] == columns else None
