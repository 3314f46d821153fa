"""Gradients of the semantic ops: differentiate the reference, recomputed from the saved inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef
from torch.utils import _pytree as pytree


def differentiate_by_reference(op: CustomOpDef, reference: Callable[..., Any]) -> None:
    """Registers a backward that runs `reference` again under autograd; only the op's inputs are kept alive."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        leaves, ctx.spec = pytree.tree_flatten(inputs)
        ctx.is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        ctx.constants = [None if tensor else leaf for leaf, tensor in zip(leaves, ctx.is_tensor, strict=True)]
        ctx.save_for_backward(*[leaf for leaf, tensor in zip(leaves, ctx.is_tensor, strict=True) if tensor])

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        saved = iter(ctx.saved_tensors)
        leaves = [next(saved) if tensor else c for c, tensor in zip(ctx.constants, ctx.is_tensor, strict=True)]
        wanted = [t and leaf.is_floating_point() for leaf, t in zip(leaves, ctx.is_tensor, strict=True)]
        leaves = [leaf.detach().requires_grad_() if want else leaf for leaf, want in zip(leaves, wanted, strict=True)]
        with torch.enable_grad():
            output = reference(*pytree.tree_unflatten(leaves, ctx.spec))
        grads = iter(
            torch.autograd.grad(
                output, [leaf for leaf, w in zip(leaves, wanted, strict=True) if w], grad, allow_unused=True
            )
        )
        result = pytree.tree_unflatten([next(grads) if want else None for want in wanted], ctx.spec)
        # The dispatcher drops trailing arguments that have their defaults; torch fills them in for setup_context, but
        # wants gradients of the passed ones alone.
        return tuple(result)[: len(ctx.needs_input_grad)]

    op.register_autograd(backward, setup_context=setup_context)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Statistics, softmax and accumulation run in float32, or in float64 for the reference scores."""
    return torch.promote_types(x.dtype, torch.float32)
