"""When a semantic op is called as an op, and how it behaves under mixed precision."""

from __future__ import annotations

import torch
from torch._library.custom_ops import CustomOpDef

HALF = (torch.float16, torch.bfloat16)  # what the Triton kernels take


def through_op(x: torch.Tensor) -> bool:
    """Whether to call the op itself: in a capture, which must see it, and on a GPU.

    On a CPU op and reference are the same code; calling the reference spares a training step the recomputation in the
    op's backward (18 to 27% of the tiny preset's step).
    """
    return torch.compiler.is_exporting() or x.is_cuda


def autocast_to_bfloat16(op: CustomOpDef) -> None:
    """Under CUDA autocast the op takes its floating-point inputs in bfloat16, since autocast does not look inside it.

    Norm statistics, softmax and accumulation stay in float32 inside.
    """
    op.register_autocast("cuda", torch.bfloat16)
