"""The popularity baseline: what ranking by click rate alone would score."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onetrans.features.batches import Indices, index_requests
from onetrans.features.logs import Logs


def popularity_scores(
    logs: Logs, train: Indices, held_out: Indices, *, item: str = "item_id", smoothing: float = 20.0
) -> NDArray[np.float64]:
    """Scores held-out impressions by their item's smoothed click rate in the training impressions.

    Args:
        logs: Holds both sides.
        train: Requests to count, as `batches.split_by_time` gives them.
        held_out: Requests to score.
        item: Categorical candidate feature that names the item.
        smoothing: Impressions of the mean click rate that every item starts with.

    Returns:
        One score per impression, in the order of the held-out requests and their candidates: that of
        `Batch.labels["click"][Batch.mask]`.
    """
    index = index_requests(logs)
    seen, scored = index.rows(train), index.rows(held_out)
    items, click = logs.impressions.candidate[item], logs.impressions.click
    vocab = int(items.max(initial=0)) + 1
    shown = np.bincount(items[seen], minlength=vocab)
    clicked = np.bincount(items[seen], weights=click[seen], minlength=vocab)
    mean = float(click[seen].mean()) if len(seen) else 0.0
    scores: NDArray[np.float64] = ((clicked + smoothing * mean) / (shown + smoothing))[items[scored]]
    return scores
