"""The activations a feed-forward may use, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,  # the exact erf form
    "silu": F.silu,
    "relu": F.relu,
}
