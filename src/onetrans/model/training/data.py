"""Training data: a log's requests, split by time, in an order that seed, epoch and step alone decide."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from onetrans.errors import ConfigError, DataError
from onetrans.features.batches import Batch, Requests, split_by_time
from onetrans.features.logs import Logs
from onetrans.features.schema import FeatureSchema
from onetrans.model.config import ModelConfig

Inputs = dict[str, torch.Tensor]
SORTED_BATCHES = 32  # batches whose requests are sorted together by history length


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """One batch for the model; U requests, C candidates.

    Attributes:
        user: User-scope inputs.
        candidate: Candidate-scope inputs [U, C].
        click: float32 [U, C].
        conversion: float32 [U, C].
        mask: Where there is a candidate, bool [U, C].
    """

    user: Inputs
    candidate: Inputs
    click: torch.Tensor
    conversion: torch.Tensor
    mask: torch.Tensor


class TrainingData:
    """The requests of a log, those for training and those held out."""

    def __init__(self, logs: Logs, model: ModelConfig, *, train_fraction: float) -> None:
        """Splits a log by time.

        Args:
            logs: Logs of the model's schema.
            model: Gives merge, history and chunk.
            train_fraction: Share of the requests, the earliest, to train on.

        Raises:
            ConfigError: The fraction is not between 0 and 1.
            DataError: The log's schema is not the model's, or one side of the split is empty.
        """
        _check_same_features(logs.schema, model.schema)
        self.logs = logs
        self.requests = Requests(
            logs,
            merge="time" if model.merge == "time" else "intent",
            max_history=model.max_history,
            chunk=model.append_chunk,
        )
        self.train, self.held_out = split_by_time(logs, train_fraction)
        self._events = np.array([len(self.requests.events(i)["timestamp"]) for i in range(len(self.requests))])

    def batches_per_epoch(self, batch_requests: int) -> int:
        """Batches of an epoch; requests that do not fill one wait for another epoch's order."""
        if batch_requests > len(self.train):
            raise ConfigError(f"batch_requests {batch_requests} exceeds the {len(self.train)} training requests")
        return len(self.train) // batch_requests

    def batch(self, *, seed: int, step: int, batch_requests: int) -> NDArray[np.int64]:
        """Training requests of one step, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.batches_per_epoch(batch_requests))
        chosen: NDArray[np.int64] = self._epoch(seed, epoch, batch_requests)[place]
        return chosen

    @lru_cache(maxsize=1)  # noqa: B019 -- one epoch of one object
    def _epoch(self, seed: int, epoch: int, batch_requests: int) -> NDArray[np.int64]:
        """Batches [n, batch_requests] in random order, each of requests with histories of like length.

        Requests are shuffled, and sorted by length within runs of `SORTED_BATCHES` batches: padding shrinks to a few
        percent while a batch stays a random draw of its length.
        """
        rng = np.random.default_rng([seed, epoch])
        count = self.batches_per_epoch(batch_requests)
        order = rng.permutation(self.train)[: count * batch_requests]
        run = SORTED_BATCHES * batch_requests
        parts = [order[i : i + run] for i in range(0, len(order), run)]
        order = np.concatenate([part[np.argsort(self._events[part], kind="stable")] for part in parts])
        batches: NDArray[np.int64] = order.reshape(count, batch_requests)[rng.permutation(count)]
        return batches

    def held_out_batches(self, batch_requests: int) -> Iterator[NDArray[np.int64]]:
        """All held-out requests, the shortest histories first."""
        order = self.held_out[np.argsort(self._events[self.held_out], kind="stable")]
        for i in range(0, len(order), batch_requests):
            yield order[i : i + batch_requests]

    def tensors(self, requests: NDArray[np.int64], device: torch.device) -> Tensors:
        """The batch of some requests on a device."""
        return to_tensors(self.requests.encode(requests), device)

    def users(self, requests: NDArray[np.int64]) -> NDArray[np.int64]:
        """The user of each impression, in the order of `Tensors.mask`."""
        index = self.requests.index
        return np.repeat(index.user_id[requests], index.count[requests])

    def sha256(self) -> str:
        """Hashes every value of the log, so that a resumed run can tell that it is the same."""
        digest = hashlib.sha256()
        for table in (self.logs.events, self.logs.impressions):
            for field in dataclasses.fields(table):
                value = getattr(table, field.name)
                for column in value.values() if isinstance(value, dict) else (value,):
                    digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()


def to_tensors(batch: Batch, device: torch.device) -> Tensors:
    """Moves a batch to a device and parts its inputs by scope."""
    inputs = {name: torch.from_numpy(column).to(device) for name, column in batch.inputs.items()}
    return Tensors(
        user={name: value for name, value in inputs.items() if not name.startswith("candidate_")},
        candidate={name: value for name, value in inputs.items() if name.startswith("candidate_")},
        click=torch.from_numpy(batch.labels["click"]).to(device),
        conversion=torch.from_numpy(batch.labels["conversion"]).to(device),
        mask=torch.from_numpy(batch.mask).to(device),
    )


def _check_same_features(log: FeatureSchema, model: FeatureSchema) -> None:
    """The values must mean the same; embedding dims, tables and groups are the model's own."""
    if log.behaviours != model.behaviours:
        raise DataError(f"the log's behaviours are {log.behaviours}, the model's {model.behaviours}; make them equal")
    theirs, ours = ({(part, f.name): (f.kind, f.vocab, f.width) for part, f in s.features()} for s in (log, model))
    for part, name in theirs | ours:
        there, here = theirs.get((part, name)), ours.get((part, name))
        if there != here:
            raise DataError(
                f"{part} feature {name} is {there or 'absent'} (kind, vocab, width) in the log and {here or 'absent'}"
                " in the model; give a --config made for this log"
            )
