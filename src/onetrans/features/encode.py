"""The model's input tensors: their names, dtypes and shapes, and how requests become them.

U users, L history tokens, C candidates. Everything ragged is left-aligned and padded with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onetrans.errors import DataError
from onetrans.features.columns import Array, Columns, Place, parse_columns, rows_to_columns
from onetrans.features.merge import TokenColumns
from onetrans.features.schema import Feature, FeatureSchema
from onetrans.precision import DType
from onetrans.spec import Scope, TensorSpec

CandidatesLike = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def input_specs(schema: FeatureSchema) -> tuple[TensorSpec, ...]:
    """Every input of a model with this schema: history first, then user, then candidate."""

    def spec(prefix: str, feature: Feature, dims: tuple[str | int, ...], scope: Scope) -> TensorSpec:
        dtype: DType = "float32" if feature.kind == "numeric" else "int64"
        widths = (feature.width,) if feature.kind == "multi" else ()
        return TensorSpec(name=f"{prefix}_{feature.name}", dtype=dtype, dims=(*dims, *widths), scope=scope)

    return (
        TensorSpec(name="event_behaviour", dtype="int64", dims=("U", "L"), scope="user"),
        *(spec("event", feature, ("U", "L"), "user") for feature in schema.event),
        TensorSpec(name="history_length", dtype="int64", dims=("U",), scope="user"),
        TensorSpec(name="history_start", dtype="int64", dims=("U",), scope="user"),
        *(spec("user", feature, ("U",), "user") for feature in schema.user),
        *(spec("candidate", feature, ("U", "C"), "candidate") for feature in schema.candidate),
    )


def encode_tokens(schema: FeatureSchema, tokens: Sequence[TokenColumns], starts: Sequence[int]) -> Columns:
    """History inputs of a batch.

    Args:
        schema: Declares the event features.
        tokens: What `merge_tokens` gives, per user.
        starts: Per user, the first token to give; tokens before it are dropped.

    Returns:
        `event_behaviour` int64 [U, L], `event_<feature>` [U, L] or [U, L, width], `history_length` int64 [U] (valid
        tokens) and `history_start` int64 [U]. L is the longest length, at least 1.

    Raises:
        DataError: A start lies outside its history.
    """
    if len(tokens) != len(starts):
        raise DataError(f"{len(tokens)} histories came with {len(starts)} starts; give one start per history")
    totals = np.array([len(columns["behaviour"]) for columns in tokens], dtype=np.int64)
    first = np.array(starts, dtype=np.int64)
    wrong = (first < 0) | (first > totals)
    if wrong.any():
        user = int(np.argmax(wrong))
        raise DataError(f"history start {first[user]} of user {user} lies outside its {totals[user]} tokens")
    begin = np.cumsum(totals) - totals + first
    flat = {
        name: np.concatenate([columns[name] for columns in tokens]) if tokens else empty
        for name, empty in _no_tokens(schema).items()
    }
    return encode_flat_tokens(flat, begin=begin, lengths=totals - first, starts=first)


def encode_flat_tokens(tokens: TokenColumns, *, begin: Array, lengths: Array, starts: Array) -> Columns:
    """History inputs of a batch whose histories are slices of one long token list.

    Args:
        tokens: Columns of all tokens, with user u's window at `begin[u]` … `begin[u] + lengths[u]`.
        begin: [U], into `tokens`.
        lengths: Valid tokens, [U].
        starts: Index of each window's first token in its history, [U].

    Returns:
        As `encode_tokens`.
    """
    inputs = {f"event_{name}": gather_padded(column, begin, lengths) for name, column in tokens.items()}
    return inputs | {"history_length": lengths.astype(np.int64), "history_start": starts.astype(np.int64)}


def encode_users(schema: FeatureSchema, profiles: Sequence[Mapping[str, Any]], *, where: str = "profile") -> Columns:
    """User inputs `user_<feature>` [U] or [U, width], from one mapping per user.

    Raises:
        DataError: A name, kind or bound is wrong.
    """
    place = Place(label=where, unit="user")
    columns = rows_to_columns([feature.name for feature in schema.user], profiles, place)
    return {f"user_{name}": column for name, column in parse_columns(schema.user, columns, place).items()}


def encode_candidates(
    schema: FeatureSchema, candidates: Sequence[CandidatesLike], *, labels: Sequence[str] | None = None
) -> tuple[Columns, NDArray[np.int64]]:
    """Candidate inputs of a batch.

    Args:
        schema: Declares the candidate features.
        candidates: Per user, a mapping of columns or a sequence of mappings; at least one candidate each.
        labels: Per user, what stands first in errors; by default `candidates of user 0` and so on.

    Returns:
        `candidate_<feature>` [U, C] or [U, C, width], and the number of candidates of each user, int64 [U].

    Raises:
        DataError: A user has no candidate, or a name, kind, bound or length is wrong.
    """
    labels = labels or [f"candidates of user {user}" for user in range(len(candidates))]
    return batch_candidates(
        [parse_candidates(schema, given, where=label) for given, label in zip(candidates, labels, strict=True)]
    )


def batch_candidates(parsed: Sequence[Columns]) -> tuple[Columns, NDArray[np.int64]]:
    """Candidate inputs of a batch from what `parse_candidates` gives per user; see `encode_candidates`.

    Raises:
        DataError: There is no user.
    """
    if not parsed:
        raise DataError("candidates: the batch has no user; give at least one")
    first = next(iter(parsed[0]))
    counts = np.array([len(columns[first]) for columns in parsed], dtype=np.int64)
    begin = np.cumsum(counts) - counts
    inputs = {
        f"candidate_{name}": gather_padded(np.concatenate([columns[name] for columns in parsed]), begin, counts)
        for name in parsed[0]
    }
    return inputs, counts


def parse_candidates(schema: FeatureSchema, given: CandidatesLike, *, where: str = "candidates") -> Columns:
    """Checks one user's candidates: a column [C] or [C, width] per candidate feature.

    Raises:
        DataError: There is none, or a name, kind, bound or length is wrong.
    """
    place = Place(label=where, unit="candidate")
    names = [feature.name for feature in schema.candidate]
    columns = given if isinstance(given, Mapping) else rows_to_columns(names, given, place)
    parsed = parse_columns(schema.candidate, columns, place)
    if not len(parsed[schema.candidate[0].name]):
        raise DataError(f"{where}: there are 0 candidates; give at least one to score")
    return parsed


def gather_padded(column: Array, begin: Array, lengths: Array) -> Array:
    """Slices `column[begin[u] : begin[u] + lengths[u]]` as rows [U, max(longest, 1), …], zeros behind."""
    longest = max(int(lengths.max(initial=0)), 1)
    positions = np.arange(longest)
    valid = positions < lengths[:, None]
    padded = np.zeros((len(lengths), longest, *column.shape[1:]), dtype=column.dtype)
    padded[valid] = column[(begin[:, None] + positions)[valid]]
    return padded


def _no_tokens(schema: FeatureSchema) -> TokenColumns:
    none: TokenColumns = {"behaviour": np.zeros(0, dtype=np.int64)}
    for feature in schema.event:
        shape = (0, feature.width) if feature.kind == "multi" else (0,)
        none[feature.name] = np.zeros(shape, dtype=np.float32 if feature.kind == "numeric" else np.int64)
    return none
