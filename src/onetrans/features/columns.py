"""Columns at the border: what a caller sends, checked against the schema and turned into arrays.

Every feature of an event, a profile, a candidate or a log passes through `parse_columns`, so a wrong value meets one
rule and one wording wherever it enters.
"""

from __future__ import annotations

import difflib
import itertools
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from onetrans.errors import DataError
from onetrans.features.schema import Feature

Array = NDArray[Any]
Columns = dict[str, Array]
Locate = Callable[[int], str]

_INT64 = np.iinfo(np.int64)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where values come from, for the words of an error.

    Attributes:
        label: The whole: `history`, `candidates of user 3`, `events.parquet`.
        unit: What one value belongs to: `event`, `user`, `candidate`, `row`.
        prefix: Stands before a feature's name: `event_` in a log file.
    """

    label: str
    unit: str
    prefix: str = ""

    def of(self, name: str) -> str:
        """Names a column."""
        return f"{self.label}: {self.prefix}{name}"

    def at(self, name: str, index: int) -> str:
        """Names one value of a column."""
        return f"{self.of(name)} of {self.unit} {index}"


def show(value: object) -> str:
    """A value on one short line, with its type where that is what is wrong."""
    plain = value.item() if isinstance(value, np.generic) else value
    try:
        text = reprlib.repr(plain)
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        text = "a huge integer"
    return text if isinstance(plain, int | float) else f"{text} ({type(plain).__name__})"


def check_names(expected: Sequence[str], given: Collection[str], where: str) -> None:
    """Names must be exactly the expected ones.

    Raises:
        DataError: One is unknown (with a suggestion where one is close) or missing.
    """
    unknown = [name for name in given if name not in expected]
    missing = [name for name in expected if name not in given]
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), missing or expected, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(expected)}"
        raise DataError(f"{where}: unknown feature {reprlib.repr(unknown[0])}{hint}")
    if missing:
        raise DataError(f"{where}: feature {missing[0]!r} is missing; needed are {', '.join(expected)}")


def rows_to_columns(names: Sequence[str], rows: object, place: Place) -> dict[str, list[Any]]:
    """Turns a sequence of mappings into one list per name.

    Raises:
        DataError: It is no sequence, a row is no mapping, or its names are not exactly `names`.
    """
    if not isinstance(rows, Sequence) or isinstance(rows, str | bytes):
        raise DataError(f"{place.label} is {show(rows)}; give a list with one mapping per {place.unit}")
    expected = set(names)
    checked: list[Mapping[str, Any]] = []
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"{place.label}: {place.unit} {index} is {show(row)}; give a mapping of feature to value")
        if row.keys() != expected:
            check_names(names, row.keys(), f"{place.label}: {place.unit} {index}")
        checked.append(row)
    return {name: [row[name] for row in checked] for name in names}


def parse_columns(features: Sequence[Feature], columns: Mapping[str, Any], place: Place) -> Columns:
    """Checks columns that hold exactly the given features.

    Args:
        features: What must be there.
        columns: Name to array-like, each with one value (or list of values) per unit.
        place: For the words of errors.

    Returns:
        Categorical int64 [n], numeric float32 [n], multi int64 [n, width] padded with zeros.

    Raises:
        DataError: A name is missing or unknown, a value is of the wrong kind or out of bounds, or lengths differ.
    """
    check_names([feature.name for feature in features], columns.keys(), place.label)
    parsed = {feature.name: parse_feature(feature, columns[feature.name], place) for feature in features}
    check_lengths(parsed, place)
    return parsed


def check_lengths(columns: Mapping[str, Array], place: Place) -> int:
    """Returns the common length of the columns.

    Raises:
        DataError: Two columns differ in length.
    """
    lengths = {name: len(column) for name, column in columns.items()}
    first = next(iter(lengths))
    for name, length in lengths.items():
        if length != lengths[first]:
            raise DataError(
                f"{place.of(name)} has {length} values and {place.prefix}{first} has {lengths[first]};"
                f" give every column one value per {place.unit}"
            )
    return lengths[first]


def parse_feature(feature: Feature, values: object, place: Place) -> Array:
    """Checks one column; see `parse_columns`."""
    if feature.kind == "multi":
        return _parse_multi(feature, values, place)
    listed = _listed(feature.name, values, place)

    def locate(index: int) -> str:
        return place.at(feature.name, index)

    return parse_ids(listed, feature.vocab, locate) if feature.kind == "categorical" else parse_numbers(listed, locate)


def parse_ids(values: Array | Sequence[Any], vocab: int, locate: Locate) -> NDArray[np.int64]:
    """Checks ids: whole numbers from 0 to vocab - 1, int64 [n]."""
    wanted = f"ids are integers from 0 to {vocab - 1}"
    ids = parse_integers(values, wanted, locate)
    if ids.size and (ids.min() < 0 or ids.max() >= vocab):
        index = int(np.argmax((ids < 0) | (ids >= vocab)))
        refuse(locate(index), ids[index], f"{wanted}; send 0 for an unknown value or raise vocab (now {vocab})")
    return ids


def parse_integers(values: Array | Sequence[Any], wanted: str, locate: Locate) -> NDArray[np.int64]:
    """Checks whole numbers that fit int64 [n]; `wanted` says what is allowed."""
    array = _of_kinds(values, "iu", wanted, locate)
    if array.dtype.kind == "u" and array.size and array.max() > _INT64.max:
        index = int(np.argmax(array > _INT64.max))
        refuse(locate(index), array[index], wanted)
    return array.astype(np.int64, copy=False)


def parse_numbers(values: Array | Sequence[Any], locate: Locate) -> NDArray[np.float32]:
    """Checks finite numbers, float32 [n]."""
    wanted = "numeric features take finite float32 numbers"
    array = _of_kinds(values, "iuf", wanted, locate)
    with np.errstate(over="ignore"):
        numbers = array.astype(np.float32, copy=False)
    finite = np.isfinite(numbers)
    if not finite.all():
        index = int(np.argmin(finite))
        refuse(locate(index), array[index], f"{wanted}; replace it before it is sent")
    return numbers


def parse_timestamps(name: str, values: object, place: Place) -> Array:
    """Checks timestamps: int64 [n] if all are whole, else finite float64 [n], in seconds."""
    wanted = "timestamps are finite seconds, as integers or floats"

    def locate(index: int) -> str:
        return place.at(name, index)

    listed = _listed(name, values, place)
    array = _of_kinds(listed, "iuf", wanted, locate)
    if array.dtype.kind != "f" or not array.size:
        return parse_integers(array, wanted, locate)
    finite = np.isfinite(array)
    if not finite.all():
        index = int(np.argmin(finite))
        refuse(locate(index), array[index], wanted)
    return array.astype(np.float64, copy=False)


def pad_lists(flat: Array, lengths: Array, width: int) -> Array:
    """Spreads the values of consecutive lists over rows [n, width], left-aligned, zeros behind."""
    padded = np.zeros((len(lengths), width), dtype=flat.dtype)
    padded[np.arange(width) < lengths[:, None]] = flat
    return padded


def refuse(where: str, value: object, wanted: str) -> NoReturn:
    """Raises the one line that every wrong value gets."""
    raise DataError(f"{where} is {show(value)}; {wanted}")


def _parse_multi(feature: Feature, values: object, place: Place) -> NDArray[np.int64]:
    rows = _listed(feature.name, values, place)
    wanted = f"multi features take lists of at most {feature.width} ids"
    if isinstance(rows, np.ndarray):
        if rows.ndim != 2:
            if not rows.size:
                return np.zeros((len(rows), feature.width), dtype=np.int64)
            raise DataError(f"{place.of(feature.name)} has shape {rows.shape}; {wanted}, or an array [n, width]")
        if rows.shape[1] > feature.width:
            rows = _without_padding(feature, rows, place, wanted)
        lengths = np.full(len(rows), rows.shape[1], dtype=np.int64)
        flat: Array | list[Any] = rows.reshape(-1)
    else:
        types = {kind for kind in set(map(type, rows)) if not issubclass(kind, list | tuple | np.ndarray)}
        if types:
            index = next(i for i, row in enumerate(rows) if type(row) in types)
            refuse(place.at(feature.name, index), rows[index], wanted)
        rows = [row.reshape(-1).tolist() if isinstance(row, np.ndarray) else row for row in rows]
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        flat = list(itertools.chain.from_iterable(rows))
    if lengths.size and lengths.max() > feature.width:
        index = int(np.argmax(lengths > feature.width))
        _refuse_long(place.at(feature.name, index), rows[index], wanted)
    ends = np.cumsum(lengths)

    def locate(index: int) -> str:
        row = int(np.searchsorted(ends, index, side="right"))
        return f"{place.at(feature.name, row)}, value {index - int(ends[row] - lengths[row])},"

    return pad_lists(parse_ids(flat, feature.vocab, locate), lengths, feature.width)


def _without_padding(feature: Feature, rows: Array, place: Place, wanted: str) -> Array:
    """An array wider than the feature, cut to its width where only padding is lost."""
    longer = (rows[:, feature.width :] != 0).any(axis=1)
    if longer.any():
        index = int(np.argmax(longer))
        _refuse_long(place.at(feature.name, index), np.trim_zeros(rows[index], "b").tolist(), wanted)
    return rows[:, : feature.width]


def _refuse_long(where: str, values: Sequence[Any], wanted: str) -> NoReturn:
    given = f"{len(values)} values: {reprlib.repr(list(values))}"
    raise DataError(f"{where} has {given}; {wanted}; drop the others or raise width")


def _listed(name: str, values: object, place: Place) -> Array | Sequence[Any]:
    """A column as a list, a tuple or an array of a plain dtype."""
    if isinstance(values, list | tuple):
        return values
    if not isinstance(values, np.ndarray) and hasattr(values, "__array__"):
        values = np.asarray(values)
    if isinstance(values, np.ndarray) and values.ndim:
        return values.tolist() if values.dtype == object else values
    raise DataError(f"{place.of(name)} is {show(values)}; give a list or array with one value per {place.unit}")


def _of_kinds(values: Array | Sequence[Any], kinds: str, wanted: str, locate: Locate) -> Array:
    """An array [n] whose dtype is one of the numpy kinds; booleans are no numbers."""
    if isinstance(values, np.ndarray):
        if not values.size:
            return np.zeros(len(values), dtype=np.int64)
        if values.ndim != 1 or values.dtype.kind not in kinds:
            value = values[0] if values.ndim == 1 else values[0].tolist()
            refuse(locate(0), value, f"{wanted} and the column is an array of {values.dtype} {list(values.shape)}")
        return values
    allowed = (int, np.integer, float, np.floating) if "f" in kinds else (int, np.integer)
    seen = set(map(type, values))
    wrong = {kind for kind in seen if issubclass(kind, bool) or not issubclass(kind, allowed)}
    if wrong:
        index = next(i for i, value in enumerate(values) if type(value) in wrong)
        refuse(locate(index), values[index], wanted)
    whole = all(issubclass(kind, int | np.integer) for kind in seen)
    try:
        return np.array(values, dtype=np.int64 if whole else np.float64)
    except OverflowError:
        index = next(i for i, value in enumerate(values) if not _INT64.min <= value <= _INT64.max)
        refuse(locate(index), values[index], wanted)
