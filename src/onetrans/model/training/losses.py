"""Losses of the tasks: clicks over all that was shown, conversions over what was clicked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from onetrans.errors import ConfigError
from onetrans.model.training.data import Tensors

TASKS = ("ctr", "cvr")


def check_tasks(tasks: tuple[str, ...]) -> None:
    """Raises where a log has no labels for a task.

    Raises:
        ConfigError: A task is neither of `TASKS`.
    """
    for task in tasks:
        if task not in TASKS:
            raise ConfigError(f"logs hold no labels for task {task!r}; training knows {', '.join(TASKS)}")


def labels_of(task: str, batch: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """A task's labels, float32 [U, C], and where they count, bool [U, C].

    CTR counts every shown candidate. CVR is the conversion given a click, so it counts clicked candidates alone.
    """
    if task == "ctr":
        return batch.click, batch.mask
    return batch.conversion, batch.mask & (batch.click > 0)


def task_losses(logits: Mapping[str, torch.Tensor], batch: Tensors) -> dict[str, torch.Tensor]:
    """Mean binary cross-entropy of each task over the candidates that count; 0 where none does.

    Args:
        logits: [U, C] per task; those of padded candidates may hold anything finite.
        batch: Labels and mask.

    Returns:
        A float32 scalar per task, in nats.
    """
    losses = {}
    for task, given in logits.items():
        labels, counts = labels_of(task, batch)
        each = F.binary_cross_entropy_with_logits(given, labels.to(given.dtype), reduction="none")
        losses[task] = torch.where(counts, each, 0.0).sum() / counts.sum().clamp(min=1)
    return losses
