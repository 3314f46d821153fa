"""Capture: a module's one `forward`, exported with dynamic shapes, as a graph whose placeholders are its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

from onetrans.errors import ExportError
from onetrans.export.models.base import Bounds, ModelAdapter
from onetrans.export.passes.base import run_pass
from onetrans.export.passes.drop_past import DropPast
from onetrans.export.program import Program, from_exported
from onetrans.spec import TensorSpec


def capture_model(model: ModelAdapter, bounds: Bounds) -> tuple[Program, Program | None]:
    """Captures the forward once; returns it with an empty state and, where appends can be exact, with a non-empty one.

    Raises:
        ExportError: The model cannot be captured within the bounds, or another op than attention reads the past.
    """
    given = model.capture_inputs(bounds)
    program = capture(model.module, given.arguments, given.specs, given.bounds, model.tasks)
    if not any(spec.state is not None for spec in program.inputs):
        return program, None
    return run_pass(program, DropPast()), program


def capture(
    module: torch.nn.Module,
    arguments: tuple[Any, ...],
    specs: Sequence[TensorSpec],
    bounds: Mapping[str, tuple[int, int]],
    outputs: Sequence[str],
) -> Program:
    """Exports `module(*arguments)` and turns parameters into constants of the graph.

    Args:
        module: In eval mode.
        arguments: Example inputs, nested as `forward` takes them; sizes of symbolic dimensions at least 2.
        specs: One per tensor of `arguments`, in flattening order.
        bounds: Least and greatest size of every symbol in the specs' dims.
        outputs: Names for the flattened outputs.

    Raises:
        ExportError: The module cannot be captured within the bounds.
    """
    tensors, tree = pytree.tree_flatten(arguments)
    given = [tensor for tensor in tensors if tensor is not None]
    if len(given) != len(specs):
        raise ExportError(f"{len(specs)} input specs were declared for {len(given)} inputs; declare one for each")
    dims = {name: Dim(name, min=least, max=most) for name, (least, most) in bounds.items()}
    remaining = iter(specs)
    shapes = [
        None if tensor is None else {i: dims[d] for i, d in enumerate(next(remaining).dims) if isinstance(d, str)}
        for tensor in tensors
    ]
    try:
        exported = torch.export.export(
            module, arguments, dynamic_shapes=pytree.tree_unflatten(shapes, tree), strict=False
        )
    except Exception as error:
        raise ExportError(f"torch.export cannot capture {type(module).__name__}: {error}") from error
    return from_exported(exported, specs, outputs)
