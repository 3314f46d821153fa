"""Requests to score, from JSON or from a log folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onetrans.errors import DataError
from onetrans.features.batches import Requests
from onetrans.features.columns import show
from onetrans.features.encode import CandidatesLike
from onetrans.features.logs import read_logs
from onetrans.features.merge import History
from onetrans.features.schema import FeatureSchema
from onetrans.files import write_new_text

_NEEDED = ("history", "profile", "candidates")
_NAMES = ("user", "request")


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One ranking request, as a caller states it.

    Attributes:
        history: The user's events: mappings, or a mapping of columns.
        profile: User feature to value.
        candidates: The candidates: mappings, or a mapping of columns.
        user: Names the user, for caches and reports.
        request: Names the request, for reports.
        label: Stands first in errors: `requests.json: request 3`. Whoever ranks it counts the requests if left out.
    """

    history: History
    profile: Mapping[str, Any]
    candidates: CandidatesLike
    user: str = ""
    request: str = ""
    label: str = ""


def read_requests(path: str | Path, schema: FeatureSchema) -> list[Request]:
    """Reads requests and checks their structure; values are checked once, by `encoder.RequestEncoder.parse`.

    Args:
        path: A JSON file (one request, a list, or `{"requests": [...]}`) or a log folder, whose every request is given
            with the events before it.
        schema: What a log folder must have been written with.

    Raises:
        DataError: The file is missing or malformed, a key is unknown or missing, or a log has another schema.
        MissingDependencyError: A log folder needs pyarrow, which is not installed.
    """
    path = Path(path)
    if path.is_dir():
        return _read_log_requests(path, schema)
    data = _read_json(path)
    if isinstance(data, dict) and "requests" in data:
        if set(data) != {"requests"}:
            other = sorted(set(data) - {"requests"})[0]
            raise DataError(f"{path}: unknown key {other!r} beside 'requests'; put it into each request or drop it")
        data = data["requests"]
        if not isinstance(data, list):
            raise DataError(f"{path}: 'requests' is {show(data)}; give a list of requests")
    listed = data if isinstance(data, list) else [data]
    if not listed:
        raise DataError(f"{path} holds no request; give at least one")
    return [_checked(request, f"{path}: request {index}") for index, request in enumerate(listed)]


def write_requests(path: str | Path, requests: Iterable[Request]) -> None:
    """Writes requests as `{"requests": [...]}`.

    Raises:
        DataError: A value is nothing that JSON can hold (NaN, an object).
        OutputExistsError: The file exists.
        JobError: The disk refused.
    """
    data = [
        {name: _plain(getattr(request, name)) for name in _NEEDED}
        | {name: getattr(request, name) for name in _NAMES if getattr(request, name)}
        for request in requests
    ]
    try:
        text = json.dumps({"requests": data}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"the requests cannot be written as JSON: {error}") from error
    write_new_text(path, text + "\n")


def _checked(data: object, where: str) -> Request:
    if not isinstance(data, dict):
        raise DataError(f"{where} is {show(data)}; give an object with the keys {', '.join(_NEEDED)}")
    unknown = sorted(set(data) - {*_NEEDED, *_NAMES})
    if unknown:
        raise DataError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join((*_NEEDED, *_NAMES))}")
    for name in _NEEDED:
        if name not in data:
            raise DataError(f"{where}: key {name!r} is missing; needed are {', '.join(_NEEDED)}")
    for name in _NAMES:
        if not isinstance(data.get(name, ""), str):
            raise DataError(f"{where}: {name} is {show(data[name])}; give a string")
    return Request(**data, label=where)


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; give a JSON file of requests or a log folder") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise DataError(f"{path} is nested too deeply to be requests") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error


def _read_log_requests(folder: Path, schema: FeatureSchema) -> list[Request]:
    logs = read_logs(folder)
    _check_same_data(logs.schema, schema, folder)
    # The reader chooses the window: histories are given whole.
    requests = Requests(logs, max_history=1)
    behaviours = np.array(schema.behaviours)
    found: list[Request] = []
    for index in range(len(requests)):
        events = requests.events(index)
        found.append(
            Request(
                history=events | {"behaviour": behaviours[events["behaviour"]]},
                profile={name: value.tolist() for name, value in requests.profile(index).items()},
                candidates=requests.candidates(index),
                user=str(requests.index.user_id[index]),
                request=str(requests.index.request_id[index]),
                label=f"{folder}: request {requests.index.request_id[index]}",
            )
        )
    return found


def _check_same_data(logged: FeatureSchema, schema: FeatureSchema, folder: Path) -> None:
    """The values must mean the same; embedding dims, tables and groups are the model's own."""
    if logged.behaviours != schema.behaviours:
        raise DataError(f"{folder}: its behaviours are {logged.behaviours}, the model's {schema.behaviours}")
    theirs, ours = ({(part, f.name): (f.kind, f.vocab, f.width) for part, f in s.features()} for s in (logged, schema))
    for part, name in theirs | ours:
        there, here = theirs.get((part, name)), ours.get((part, name))
        if there != here:
            raise DataError(
                f"{folder}: {part} feature {name} is {there or 'absent'} (kind, vocab, width) in the log and"
                f" {here or 'absent'} in the model; use logs of the model's schema"
            )


def _plain(value: Any) -> Any:
    """Arrays and numpy scalars as JSON's lists and numbers."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
