"""Mixed precision: under `torch.autocast` the semantic ops take their floating-point inputs in bfloat16.

Without this the ops would run in the dtype of the float32 weights, since autocast does not look inside a custom op.
Norm statistics, softmax and accumulation stay in float32 inside the ops.
"""

from __future__ import annotations

import torch
from torch._library.custom_ops import CustomOpDef

DEVICES = ("cpu", "cuda")


def autocast_to_bfloat16(op: CustomOpDef) -> None:
    """Registers the cast for every device; float64 and integer inputs are left alone."""
    for device in DEVICES:
        op.register_autocast(device, torch.bfloat16)
