"""Scores on held-out requests, beside the popularity baseline."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from onetrans.features.popularity import popularity_scores
from onetrans.model.onetrans import OneTrans
from onetrans.model.training.data import TrainingData
from onetrans.model.training.losses import labels_of
from onetrans.model.training.metrics import auc, uauc

Report = dict[str, dict[str, float | None]]


def evaluate(model: OneTrans, data: TrainingData, *, batch_requests: int) -> Report:
    """AUC and UAUC of each task over the held-out requests: `{"ctr": {"auc": …, "uauc": …}, …}`.

    CTR counts every impression, CVR the clicked ones. A value is None where a class is absent.
    """
    device = next(model.parameters()).device
    found: dict[str, list[NDArray[np.float64]]] = {}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for requests in data.held_out_batches(batch_requests):
            batch = data.tensors(requests, device)
            logits = model(batch.user, batch.candidate)
            users = np.zeros(batch.mask.shape, dtype=np.int64)
            users[batch.mask.cpu().numpy()] = data.users(requests)
            for task, given in logits.items():
                labels, counts = labels_of(task, batch)
                kept = counts.cpu().numpy()
                columns = (users, labels.cpu().numpy(), given.cpu().double().numpy())
                found.setdefault(task, []).append(np.stack([column[kept] for column in columns]))
    model.train(was_training)
    return {task: _measures(*np.concatenate(parts, axis=1)) for task, parts in found.items()}


def popularity(data: TrainingData, tasks: tuple[str, ...]) -> Report | None:
    """The same of ranking by the click rate of the item alone; None where no categorical feature names an item."""
    named = [f.name for f in data.logs.schema.candidate if f.kind == "categorical"]
    if not named:
        return None
    item = "item_id" if "item_id" in named else named[0]
    scores = popularity_scores(data.logs, data.train, data.held_out, item=item)
    users, shown = data.users(data.held_out), data.logs.impressions
    rows = data.requests.index.rows(data.held_out)
    click, conversion = shown.click[rows], shown.conversion[rows]
    clicked = click > 0
    report = {
        "ctr": _measures(users, click, scores),
        "cvr": _measures(users[clicked], conversion[clicked], scores[clicked]),
    }
    return {task: report[task] for task in tasks}


def _measures(
    users: NDArray[np.generic], labels: NDArray[np.generic], scores: NDArray[np.generic]
) -> dict[str, float | None]:
    measured = {"auc": auc(labels, scores), "uauc": uauc(users, labels, scores)}
    return {name: None if math.isnan(value) else value for name, value in measured.items()}
