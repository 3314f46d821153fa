"""Parquet files to and from numpy columns. pyarrow is imported when a file is read or written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from onetrans.errors import DataError, MissingDependencyError
from onetrans.features.columns import Array, pad_lists

ColumnType = Literal["integer", "number", "lists"]


def write_table(path: Path, columns: Mapping[str, Array]) -> None:
    """Writes columns [n]; those of shape [n, width] become lists without the zeros at their end."""
    arrow, arrow_parquet = _arrow()
    table = arrow.table({name: _to_arrow(arrow, column) for name, column in columns.items()})
    arrow_parquet.write_table(table, path, compression="zstd")


def read_table(path: Path, wanted: Mapping[str, ColumnType], text: str = "") -> dict[str, Any]:
    """Reads columns of the wanted types.

    Args:
        path: A Parquet file.
        wanted: Column to type: `integer` and `number` give an array [n], `lists` an array [n, longest] padded with
            zeros.
        text: A column of strings, given as a list.

    Raises:
        DataError: The file or a column is missing or unreadable, of another type, or has an absent value.
        MissingDependencyError: pyarrow is not installed.
    """
    arrow, arrow_parquet = _arrow()
    names = [*wanted, *([text] if text else [])]
    try:
        with arrow_parquet.ParquetFile(path) as file:
            missing = [name for name in names if name not in file.schema_arrow.names]
            if missing:
                raise DataError(f"{path}: column {missing[0]} is missing; needed are {', '.join(names)}")
            table = file.read(columns=names)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}") from error
    columns: dict[str, Any] = {}
    for name in names:
        column = table.column(name).combine_chunks()
        _check_type(arrow, path, name, column, wanted.get(name, "strings"))
        if name == text:
            columns[name] = column.to_pylist()
        elif wanted[name] == "lists":
            lengths = column.value_lengths().to_numpy(zero_copy_only=False)
            flat = column.flatten().to_numpy(zero_copy_only=False)
            columns[name] = pad_lists(flat, lengths, int(lengths.max(initial=0)))
        else:
            columns[name] = column.to_numpy(zero_copy_only=False)
    return columns


def _to_arrow(arrow: ModuleType, column: Array) -> Any:
    if column.ndim == 1:
        return arrow.array(column)
    used = np.where(column != 0, np.arange(1, column.shape[1] + 1), 0).max(axis=1, initial=0)
    values = column[np.arange(column.shape[1]) < used[:, None]]
    offsets = np.concatenate([[0], np.cumsum(used)]).astype(np.int32)
    return arrow.ListArray.from_arrays(arrow.array(offsets), arrow.array(values))


def _check_type(arrow: ModuleType, path: Path, name: str, column: Any, wanted: str) -> None:
    types, given = arrow.types, column.type
    text = types.is_string(given) or types.is_large_string(given)
    lists = (types.is_list(given) or types.is_large_list(given)) and types.is_integer(given.value_type)
    fits = {
        "integer": types.is_integer(given),
        "number": types.is_integer(given) or types.is_floating(given),
        "lists": lists,
        "strings": text or (types.is_dictionary(given) and types.is_string(given.value_type)),
    }
    if not fits[wanted]:
        expected = {"lists": "lists of integers", "strings": "strings"}.get(wanted, f"{wanted}s")
        raise DataError(f"{path}: column {name} has type {given}; it takes {expected}")
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise DataError(f"{path}: {name} of row {row} is null; every row needs a value")
    if lists and column.flatten().null_count:
        row = next(index for index, values in enumerate(column.to_pylist()) if None in values)
        raise DataError(f"{path}: {name} of row {row} has a null in its list; leave it out or send 0")


def _arrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as arrow_parquet
    except ImportError as error:
        raise MissingDependencyError(
            'Parquet logs need pyarrow, which is not installed; pip install "onetrans-export[serve]"'
        ) from error
    return arrow, arrow_parquet
