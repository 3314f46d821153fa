"""Semantic ops out of their references: the signature of a reference is the op's schema, written once."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch._library.custom_ops import CustomOpDef

from onetrans.kernels.autograd import differentiate_by_reference

HALF = (torch.float16, torch.bfloat16)  # the dtypes of the Triton kernels
P = ParamSpec("P")
R = TypeVar("R")


def define_op(
    name: str,
    reference: Callable[P, R],
    *,
    fake: Callable[..., Any],
    kernel: str,
    mutates: Sequence[str] = (),
    gradient: bool = True,
    autocast: bool = True,
) -> tuple[CustomOpDef, Callable[P, R]]:
    """Defines `onetrans::name` with the reference's parameters; the first of them is a tensor.

    On CUDA the op runs the Triton kernel in float16 and bfloat16. Full precision, that of the float64 reference and of
    training, always runs the reference: the kernels multiply on matrix units, which have no full precision.

    Args:
        name: The op's, the same in the schema, the kernels' folder, lowerings, tests and benchmarks.
        reference: Plain PyTorch; its annotations and defaults become the schema.
        fake: The result's shape and dtype for a capture; takes the same arguments.
        kernel: `module:function` of the `onetrans_triton` op, imported at the first launch: Triton is Linux only.
        mutates: Arguments that the op writes.
        gradient: Differentiate the reference; without, the op has no backward.
        autocast: Take floating-point inputs in bfloat16 under CUDA autocast, which does not look inside the op. Norm
            statistics, softmax and accumulation stay in float32 inside.

    Returns:
        The op, and the function that models call: the op in a capture, which must see it, and on a GPU, else the
        reference. On a CPU both compute the same, and the reference spares a training step the recomputation in the
        op's backward (18 to 27% of the tiny preset's step).
    """
    op = torch.library.custom_op(f"onetrans::{name}", reference, mutates_args=tuple(mutates))
    op.register_fake(fake)

    @op.register_kernel("cuda")
    def _(x: torch.Tensor, *rest: Any) -> Any:
        if x.dtype not in HALF:
            return reference(x, *rest)  # type: ignore[call-arg, arg-type]
        with torch.cuda.device(x.device):
            return _load(kernel)(x, *rest)

    if gradient:
        differentiate_by_reference(op, reference)
    if autocast:
        op.register_autocast("cuda", torch.bfloat16)

    first = next(iter(inspect.signature(reference).parameters))

    @functools.wraps(reference)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        x: Any = args[0] if args else kwargs[first]
        if torch.compiler.is_exporting() or x.is_cuda:
            result: R = op(*args, **kwargs)
            return result
        return reference(*args, **kwargs)

    return op, call


def _load(kernel: str) -> Callable[..., Any]:
    module, function = kernel.split(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return loaded
