"""Logs of a recommender: what users did (events) and what they were shown (impressions).

A log folder holds `schema.json`, `events.parquet` and `impressions.parquet`. Feature columns are named as the model's
inputs are (`event_price`, `user_age`, `candidate_item_id`), behaviours are stored by name, multi features as lists.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onetrans.errors import ConfigError, DataError
from onetrans.features import parquet
from onetrans.features.columns import Array, Columns, Place, check_lengths, parse_columns, parse_integers, refuse, show
from onetrans.features.merge import parse_behaviours
from onetrans.features.schema import Feature, FeatureSchema
from onetrans.files import new_folder

SCHEMA_FILE, EVENTS_FILE, IMPRESSIONS_FILE = "schema.json", "events.parquet", "impressions.parquet"
LABELS = ("click", "conversion")


@dataclass(frozen=True, kw_only=True, eq=False)
class Events:
    """Every event of every user.

    Attributes:
        user_id: int64 [n].
        timestamp: Seconds, int64 [n].
        behaviour: Index into the schema's behaviours, int64 [n].
        features: Event features, [n] or [n, width].
    """

    user_id: Array
    timestamp: Array
    behaviour: Array
    features: Columns


@dataclass(frozen=True, kw_only=True, eq=False)
class Impressions:
    """Every candidate shown; the rows of one request share its id, user, timestamp and user features.

    Attributes:
        request_id: int64 [n].
        user_id: int64 [n].
        timestamp: Seconds, int64 [n].
        user: User features, [n] or [n, width].
        candidate: Candidate features, [n] or [n, width].
        click: 0 or 1, int8 [n].
        conversion: 0 or 1, int8 [n]; at most `click`.
    """

    request_id: Array
    user_id: Array
    timestamp: Array
    user: Columns
    candidate: Columns
    click: Array
    conversion: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class Logs:
    """Events and impressions under one schema, checked where they are made.

    Raises:
        DataError: A column is missing, of the wrong kind, out of bounds or of another length; or a conversion has no
            click.
        ConfigError: A user feature is called `id`, which a log keeps for the user.
    """

    schema: FeatureSchema
    events: Events
    impressions: Impressions

    def __post_init__(self) -> None:
        if any(feature.name == "id" for feature in self.schema.user):
            raise ConfigError("user feature 'id' collides with the log's column user_id; rename the feature")
        object.__setattr__(self, "events", _checked_events(self.schema, self.events, "events"))
        object.__setattr__(self, "impressions", _checked_impressions(self.schema, self.impressions, "impressions"))


def write_logs(logs: Logs, folder: str | Path) -> None:
    """Writes a log folder, whole or not at all.

    Raises:
        OutputExistsError: The folder exists.
        MissingDependencyError: pyarrow is not installed.
        JobError: The disk refused.
    """
    events, shown = logs.events, logs.impressions
    names = np.array(logs.schema.behaviours, dtype=object)
    with new_folder(folder) as unfinished:
        parquet.write_table(
            unfinished / EVENTS_FILE,
            {"user_id": events.user_id, "timestamp": events.timestamp, "behaviour": names[events.behaviour]}
            | _prefixed("event_", events.features),
        )
        parquet.write_table(
            unfinished / IMPRESSIONS_FILE,
            {"request_id": shown.request_id, "user_id": shown.user_id, "timestamp": shown.timestamp}
            | _prefixed("user_", shown.user)
            | _prefixed("candidate_", shown.candidate)
            | {"click": shown.click, "conversion": shown.conversion},
        )
        text = json.dumps(logs.schema.to_json(), indent=2)
        (unfinished / SCHEMA_FILE).write_text(text + "\n", encoding="utf-8")


def read_logs(folder: str | Path) -> Logs:
    """Reads and checks a log folder; Parquet columns that the schema does not name are left alone.

    Raises:
        DataError: A file or column is missing, unreadable, of the wrong type, or holds a wrong value.
        MissingDependencyError: pyarrow is not installed.
    """
    folder = Path(folder)
    schema = _read_schema(folder / SCHEMA_FILE)
    event = _wanted("event_", schema.event)
    given = parquet.read_table(folder / EVENTS_FILE, _keys("user_id", "timestamp") | event, text="behaviour")
    place = Place(label=str(folder / EVENTS_FILE), unit="row")
    events = Events(
        user_id=given["user_id"],
        timestamp=given["timestamp"],
        behaviour=parse_behaviours(schema, given["behaviour"], place),
        features=_unprefixed("event_", schema.event, given),
    )
    user, candidate = _wanted("user_", schema.user), _wanted("candidate_", schema.candidate)
    keys = _keys("request_id", "user_id", "timestamp", *LABELS)
    given = parquet.read_table(folder / IMPRESSIONS_FILE, keys | user | candidate)
    impressions = Impressions(
        request_id=given["request_id"],
        user_id=given["user_id"],
        timestamp=given["timestamp"],
        user=_unprefixed("user_", schema.user, given),
        candidate=_unprefixed("candidate_", schema.candidate, given),
        click=given["click"],
        conversion=given["conversion"],
    )
    return Logs(
        schema=schema,
        events=_checked_events(schema, events, str(folder / EVENTS_FILE)),
        impressions=_checked_impressions(schema, impressions, str(folder / IMPRESSIONS_FILE)),
    )


def _checked_events(schema: FeatureSchema, events: Events, label: str) -> Events:
    place = Place(label=label, unit="row")
    keys = _integers({"user_id": events.user_id, "timestamp": events.timestamp}, place)
    keys["behaviour"] = parse_behaviours(schema, events.behaviour, place)
    features = parse_columns(schema.event, events.features, Place(label=label, unit="row", prefix="event_"))
    check_lengths(keys | _prefixed("event_", features), place)
    return Events(**keys, features=features)


def _checked_impressions(schema: FeatureSchema, shown: Impressions, label: str) -> Impressions:
    place = Place(label=label, unit="row")
    names = ("request_id", "user_id", "timestamp", *LABELS)
    keys = _integers({name: getattr(shown, name) for name in names}, place)
    user = parse_columns(schema.user, shown.user, Place(label=label, unit="row", prefix="user_"))
    candidate = parse_columns(schema.candidate, shown.candidate, Place(label=label, unit="row", prefix="candidate_"))
    check_lengths(keys | _prefixed("user_", user) | _prefixed("candidate_", candidate), place)
    for name in LABELS:
        wrong = (keys[name] < 0) | (keys[name] > 1)
        if wrong.any():
            row = int(np.argmax(wrong))
            refuse(place.at(name, row), keys[name][row], "labels are 0 or 1")
        keys[name] = keys[name].astype(np.int8)
    wrong = keys["conversion"] > keys["click"]
    if wrong.any():
        where = place.at("conversion", int(np.argmax(wrong)))
        raise DataError(f"{where} is 1 and its click is 0; a conversion implies a click, so set both or neither")
    return Impressions(**keys, user=user, candidate=candidate)


def _integers(columns: Mapping[str, Array], place: Place) -> Columns:
    parsed: Columns = {}
    for name, column in columns.items():

        def locate(index: int, name: str = name) -> str:
            return place.at(name, index)

        parsed[name] = parse_integers(np.asarray(column), f"{name} is an integer", locate)
    return parsed


def _prefixed(prefix: str, columns: Columns) -> Columns:
    return {f"{prefix}{name}": column for name, column in columns.items()}


def _unprefixed(prefix: str, features: tuple[Feature, ...], columns: Mapping[str, Any]) -> dict[str, Any]:
    return {feature.name: columns[f"{prefix}{feature.name}"] for feature in features}


def _keys(*names: str) -> dict[str, parquet.ColumnType]:
    return dict.fromkeys(names, "integer")


def _wanted(prefix: str, features: tuple[Feature, ...]) -> dict[str, parquet.ColumnType]:
    types: dict[str, parquet.ColumnType] = {"categorical": "integer", "numeric": "number", "multi": "lists"}
    return {f"{prefix}{feature.name}": types[feature.kind] for feature in features}


def _read_schema(path: Path) -> FeatureSchema:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        files = f"{SCHEMA_FILE}, {EVENTS_FILE} and {IMPRESSIONS_FILE}"
        raise DataError(f"{path} is missing; a log folder holds {files}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise DataError(f"{path} holds {show(data)}; a feature schema is a JSON object")
    try:
        return FeatureSchema.from_json(data)
    except ConfigError as error:
        raise DataError(f"{path}: {error}") from error
