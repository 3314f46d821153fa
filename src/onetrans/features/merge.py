"""Merging of behaviour sequences into the S-tokens of arXiv 2510.26104, section 3.2.

`time` interleaves all behaviours by timestamp; `intent` concatenates them, strongest intent first, with a [SEP] token
between. A token is its behaviour id and its feature values; time itself is gone after the merge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from onetrans.errors import ConfigError, DataError
from onetrans.features.columns import (
    Array,
    Columns,
    Place,
    check_lengths,
    check_names,
    parse_feature,
    parse_timestamps,
    refuse,
    rows_to_columns,
    show,
)
from onetrans.features.schema import FeatureSchema

Merge = Literal["time", "intent"]
MERGES: tuple[Merge, ...] = get_args(Merge)

History = Sequence[Mapping[str, Any]] | Mapping[str, Any]
EventColumns = Columns
TokenColumns = Columns


def parse_history(schema: FeatureSchema, history: History, *, where: str = "history") -> EventColumns:
    """Checks one user's events.

    Args:
        schema: Declares the behaviours and the event features.
        history: Event mappings, or a mapping of columns. `behaviour` holds names (or an integer array of indices into
            `schema.behaviours`), `timestamp` seconds. Empty in either form for a user without events.
        where: Stands first in errors.

    Returns:
        `behaviour` int64 [n] (index into `schema.behaviours`), `timestamp` int64 or float64 [n], and every event
        feature: int64 [n], float32 [n] or int64 [n, width]; in the order given.

    Raises:
        DataError: A name, kind, bound or length is wrong, or timestamps go back within one behaviour.
    """
    place = Place(label=where, unit="event")
    names = ("behaviour", "timestamp", *(feature.name for feature in schema.event))
    columns: Mapping[str, Any]
    if isinstance(history, Mapping):
        columns = history or {name: [] for name in names}
        check_names(names, columns.keys(), where)
    else:
        columns = rows_to_columns(names, history, place)
    parsed = {
        "behaviour": parse_behaviours(schema, columns["behaviour"], place),
        "timestamp": parse_timestamps("timestamp", columns["timestamp"], place),
        **{feature.name: parse_feature(feature, columns[feature.name], place) for feature in schema.event},
    }
    check_lengths(parsed, place)
    _check_order(schema, parsed["behaviour"], parsed["timestamp"], place)
    return parsed


def merge_tokens(schema: FeatureSchema, columns: EventColumns, merge: Merge) -> TokenColumns:
    """Merges checked events into one token sequence.

    Args:
        schema: Declares the behaviours.
        columns: What `parse_history` gives.
        merge: `time` sorts by timestamp, ties keeping the order given. `intent` concatenates the behaviours in the
            order of `schema.behaviours`, each by time, with one [SEP] before every non-empty one but the first.

    Returns:
        `behaviour` int64 [n] and every event feature. The behaviour of a [SEP] is `len(schema.behaviours)` plus the
        index of the behaviour that follows it, and its feature values are zero.
    """
    if merge not in MERGES:
        raise ConfigError(f"merge {merge!r} is not one of {', '.join(MERGES)}")
    behaviour, timestamp = columns["behaviour"], columns["timestamp"]
    tokens = {name: column for name, column in columns.items() if name != "timestamp"}
    if merge == "time":
        order = np.argsort(timestamp, kind="stable")
        return {name: column[order] for name, column in tokens.items()}

    order = np.lexsort((timestamp, behaviour))
    present, first = np.unique(behaviour[order], return_index=True)
    # A behaviour's tokens move right by the number of [SEP] before them.
    moved = np.searchsorted(present, behaviour[order])
    slots = np.arange(len(order)) + moved
    merged: TokenColumns = {}
    for name, column in tokens.items():
        merged[name] = np.zeros((len(order) + max(len(present) - 1, 0), *column.shape[1:]), dtype=column.dtype)
        merged[name][slots] = column[order]
    merged["behaviour"][slots[first[1:]] - 1] = len(schema.behaviours) + present[1:]
    return merged


def parse_behaviours(schema: FeatureSchema, values: object, place: Place) -> NDArray[np.int64]:
    """Indices into `schema.behaviours` [n], from names or from an integer array of indices."""
    known = schema.behaviours
    wanted = f"known behaviours are {', '.join(known)}"
    if isinstance(values, np.ndarray) and values.dtype.kind in "iu":
        wrong = (values < 0) | (values >= len(known))
        if wrong.any():
            index = int(np.argmax(wrong))
            refuse(place.at("behaviour", index), values[index], f"{wanted}, by index 0 to {len(known) - 1}")
        return values.astype(np.int64, copy=False)
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise DataError(f"{place.of('behaviour')} is {show(values)}; give one behaviour per {place.unit}")
    index_of = {name: index for index, name in enumerate(known)}
    try:
        return np.fromiter(map(index_of.__getitem__, values), dtype=np.int64, count=len(values))
    except (KeyError, TypeError):
        index = next(i for i, value in enumerate(values) if not isinstance(value, str) or value not in index_of)
        refuse(place.at("behaviour", index), values[index], wanted)


def _check_order(schema: FeatureSchema, behaviour: Array, timestamp: Array, place: Place) -> None:
    for index, name in enumerate(schema.behaviours):
        events = np.flatnonzero(behaviour == index)
        back = np.flatnonzero(timestamp[events][1:] < timestamp[events][:-1])
        if back.size:
            before, event = events[back[0]], int(events[back[0] + 1])
            raise DataError(
                f"{place.at('timestamp', event)} is {show(timestamp[event])}, earlier than {show(timestamp[before])}"
                f" of {place.unit} {before}; sort the {name} events by time"
            )
