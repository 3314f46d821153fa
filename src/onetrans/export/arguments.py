"""A node's arguments by the names of its op's schema, so that no rewrite counts positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from onetrans.errors import ExportError


def op_name(node: fx.Node) -> str:
    """The op that a node calls, as `onetrans::history_attention` or `aten::view`; empty where it calls none."""
    return str(node.target._schema.name) if isinstance(node.target, torch._ops.OpOverload) else ""


def is_op(node: object, *targets: torch._ops.OpOverload) -> bool:
    """Whether a graph's value is the result of one of these ops."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument of the node's op, by name; those that were left out have their defaults.

    Raises:
        ExportError: The node calls no op with a schema.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        raise ExportError(f"{node.name} calls {node.target}, whose arguments have no names")
    stated = node.target._schema.arguments
    given = dict(zip((argument.name for argument in stated), node.args, strict=False)) | dict(node.kwargs)
    return {argument.name: given.get(argument.name, argument.default_value) for argument in stated}


def as_call(target: torch._ops.OpOverload, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by name as positional and keyword ones; trailing ones that have their defaults are left out.

    Raises:
        ExportError: The op has no argument of a name, or lacks one.
    """
    stated = target._schema.arguments
    unknown = values.keys() - {argument.name for argument in stated}
    missing = {a.name for a in stated if not a.has_default_value()} - values.keys()
    if unknown or missing:
        raise ExportError(f"{target} takes no {', '.join(sorted(unknown))}, or lacks {', '.join(sorted(missing))}")
    last = 0
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    for argument in stated:
        value = values.get(argument.name, argument.default_value)
        is_default = argument.has_default_value() and _same(value, argument.default_value)
        if argument.kwarg_only:
            if not is_default:
                keywords[argument.name] = value
            continue
        positional.append(value)
        if not is_default:
            last = len(positional)
    return tuple(positional[:last]), keywords


def _same(value: Any, default: Any) -> bool:
    return not isinstance(value, fx.Node) and type(value) is type(default) and bool(value == default)
