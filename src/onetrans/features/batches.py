"""Training batches from logs: requests in order of time, each with the history that was known when it came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onetrans.errors import ConfigError, DataError
from onetrans.features.columns import Array, Columns
from onetrans.features.encode import encode_flat_tokens, encode_tokens, gather_padded
from onetrans.features.logs import LABELS, Impressions, Logs
from onetrans.features.merge import MERGES, EventColumns, Merge, TokenColumns, merge_tokens
from onetrans.features.windows import Pyramid

Indices = Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Model inputs and labels of some requests; U requests, C candidates.

    Attributes:
        inputs: Every tensor of `encode.input_specs`.
        labels: `click` and `conversion`, float32 [U, C], zero where there is no candidate.
        mask: Where there is a candidate, bool [U, C].
    """

    inputs: Columns
    labels: Columns
    mask: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class RequestIndex:
    """Which impressions belong to which request; requests stand in order of time, then of id.

    Attributes:
        order: Impression rows with those of a request together, [n].
        begin: Where each request begins in `order`, [R].
        count: Its candidates, [R].
        request_id: [R].
        user_id: [R].
        timestamp: [R].
    """

    order: Array
    begin: Array
    count: Array
    request_id: Array
    user_id: Array
    timestamp: Array

    def rows(self, indices: Indices) -> NDArray[np.int64]:
        """Impression rows of some requests, one request after the other."""
        chosen = np.asarray(indices, dtype=np.int64)
        count = self.count[chosen]
        offsets = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        rows: NDArray[np.int64] = self.order[np.repeat(self.begin[chosen], count) + offsets]
        return rows


def index_requests(logs: Logs) -> RequestIndex:
    """Groups the impressions by request.

    Raises:
        DataError: The rows of a request disagree about the user, the timestamp or a user feature.
    """
    shown = logs.impressions
    order = np.argsort(shown.request_id, kind="stable")
    ids, begin, count = np.unique(shown.request_id[order], return_index=True, return_counts=True)
    first = order[begin]
    shared = {"user_id": shown.user_id, "timestamp": shown.timestamp}
    shared |= {f"user_{name}": column for name, column in shown.user.items()}
    for name, column in shared.items():
        differs = column[order] != np.repeat(column[first], count, axis=0)
        if differs.any():
            row = int(order[np.argmax(differs.reshape(len(order), -1).any(axis=1))])
            raise DataError(
                f"impressions: {name} of row {row} differs within request {shown.request_id[row]};"
                " all candidates of a request share its user, time and user features"
            )
    by_time = np.lexsort((ids, shown.timestamp[first]))
    return RequestIndex(
        order=order,
        begin=begin[by_time],
        count=count[by_time],
        request_id=ids[by_time],
        user_id=shown.user_id[first][by_time],
        timestamp=shown.timestamp[first][by_time],
    )


def split_by_time(logs: Logs, fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Splits requests into the earliest `fraction`, for training, and the later ones, held out.

    Requests of one timestamp stay together, on the held-out side.

    Returns:
        Request indices in the order of `Requests`, each int64.

    Raises:
        ConfigError: `fraction` is not between 0 and 1.
        DataError: One side would be empty.
    """
    if not 0.0 < fraction < 1.0:
        raise ConfigError(f"fraction {fraction} of the requests cannot be split off; give one between 0 and 1")
    times = index_requests(logs).timestamp
    cut = int(len(times) * fraction)
    cut = int(np.searchsorted(times, times[cut])) if len(times) else 0
    if not 0 < cut < len(times):
        raise DataError(f"{len(times)} requests cannot be split by time at fraction {fraction}: one side has none")
    return np.arange(cut), np.arange(cut, len(times))


class Requests:
    """The requests of a log, ready to become batches.

    A history is the user's events strictly before the request. For the time merge it is a prefix of the user's
    merged tokens, so tokens are merged once and a batch is a gather; for the intent merge each history is merged anew.
    """

    def __init__(self, logs: Logs, *, merge: Merge = "time", max_history: int, chunk: int = 1) -> None:
        """Indexes the log.

        Args:
            logs: What was shown and done.
            merge: How behaviours become one sequence.
            max_history: Most tokens behind the anchor: keep_0 of `windows.Pyramid`.
            chunk: The anchor's step: c of `windows.Pyramid`.
        """
        if merge not in MERGES:
            raise ConfigError(f"merge {merge!r} is not one of {', '.join(MERGES)}")
        if max_history < 1 or chunk < 1:
            raise ConfigError(f"max_history {max_history} and chunk {chunk} must be at least 1")
        self.logs, self.schema = logs, logs.schema
        self.merge: Merge = merge
        self.max_history, self.chunk = max_history, chunk
        self.index = index_requests(logs)
        events = logs.events
        by_user = np.lexsort((events.timestamp, events.user_id))
        self._timestamp = events.timestamp[by_user]
        self._tokens: TokenColumns = {"behaviour": events.behaviour[by_user]}
        self._tokens |= {name: column[by_user] for name, column in events.features.items()}
        self._begin, self._length = self._find_histories(events.user_id[by_user])
        # A request's rows in one run, so that a batch reads memory in order.
        shown, order = logs.impressions, self.index.order
        self._shown = Impressions(
            request_id=shown.request_id[order],
            user_id=shown.user_id[order],
            timestamp=shown.timestamp[order],
            user={name: column[order] for name, column in shown.user.items()},
            candidate={name: column[order] for name, column in shown.candidate.items()},
            click=shown.click[order],
            conversion=shown.conversion[order],
        )

    def __len__(self) -> int:
        return len(self.index.request_id)

    def events(self, request: int) -> EventColumns:
        """The user's events before a request, by time, as `merge.parse_history` gives them."""
        known = slice(self._begin[request], self._begin[request] + self._length[request])
        columns: EventColumns = {"behaviour": self._tokens["behaviour"][known], "timestamp": self._timestamp[known]}
        return columns | {feature.name: self._tokens[feature.name][known] for feature in self.schema.event}

    def history(self, request: int) -> TokenColumns:
        """All merged tokens of the history at a request, before any window."""
        return merge_tokens(self.schema, self.events(request), self.merge)

    def profile(self, request: int) -> Columns:
        """User features of a request, each a scalar array or [width]."""
        return {name: column[self.index.begin[request]] for name, column in self._shown.user.items()}

    def candidates(self, request: int) -> Columns:
        """Candidate features of a request, each [C] or [C, width]."""
        begin = self.index.begin[request]
        rows = slice(begin, begin + self.index.count[request])
        return {name: column[rows] for name, column in self._shown.candidate.items()}

    def encode(self, indices: Indices) -> Batch:
        """Builds the batch of some requests.

        Args:
            indices: Requests, in the order of `RequestIndex`.

        Returns:
            Inputs, labels and candidate mask; the order of the requests is that of `indices`.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        begin, count = self.index.begin[chosen], self.index.count[chosen]
        inputs = self._encode_histories(chosen)
        inputs |= {f"user_{name}": column[begin] for name, column in self._shown.user.items()}
        for name, column in self._shown.candidate.items():
            inputs[f"candidate_{name}"] = gather_padded(column, begin, count)
        labels = {name: gather_padded(getattr(self._shown, name), begin, count).astype(np.float32) for name in LABELS}
        mask = np.arange(labels["click"].shape[1]) < count[:, None]
        return Batch(inputs=inputs, labels=labels, mask=mask)

    def _encode_histories(self, chosen: NDArray[np.int64]) -> Columns:
        if self.merge == "time":
            length = self._length[chosen]
            starts = self._starts(length)
            return encode_flat_tokens(
                self._tokens, begin=self._begin[chosen] + starts, lengths=length - starts, starts=starts
            )
        histories = [self.history(int(request)) for request in chosen]
        lengths = np.array([len(tokens["behaviour"]) for tokens in histories], dtype=np.int64)
        return encode_tokens(self.schema, histories, self._starts(lengths).tolist())

    def _starts(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        distinct, which = np.unique(lengths, return_inverse=True)
        pyramid = Pyramid(max_history=self.max_history, keep=(self.max_history,), chunk=self.chunk)
        starts = [pyramid.starts(int(length))[0] for length in distinct]
        return np.array(starts, dtype=np.int64)[which]

    def _find_histories(self, user_id: Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Begin and length of each request's history in the events sorted by user and time."""
        begin = np.searchsorted(user_id, self.index.user_id)
        # User and time as one integer key, small enough for any log: ranks, not values.
        users, times = np.unique(user_id), np.unique(self._timestamp)
        key = np.searchsorted(users, user_id) * (len(times) + 1) + np.searchsorted(times, self._timestamp)
        known = np.isin(self.index.user_id, users)
        wanted = np.searchsorted(users, self.index.user_id) * (len(times) + 1)
        end = np.searchsorted(key, wanted + np.searchsorted(times, self.index.timestamp))
        return begin, np.where(known, end - begin, 0)
