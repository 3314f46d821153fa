"""Logs in and out, the histories that requests see, and requests in JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onetrans.errors import ConfigError, DataError, MissingDependencyError, OutputExistsError
from onetrans.features.batches import Requests, index_requests, split_by_time
from onetrans.features.encode import encode_candidates, encode_tokens, encode_users, input_specs
from onetrans.features.encoder import RequestEncoder
from onetrans.features.logs import Events, Impressions, Logs, read_logs, write_logs
from onetrans.features.merge import merge_tokens, parse_history
from onetrans.features.requests import Request, read_requests, write_requests
from onetrans.features.schema import Feature, FeatureSchema
from onetrans.features.synthetic.logs import generate
from onetrans.features.windows import Pyramid

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def logs() -> Logs:
    return generate(users=40, requests_per_user=6, items=60, candidates_per_request=5, seed=5)


@pytest.fixture
def folder(logs: Logs, tmp_path: Path) -> Path:
    write_logs(logs, tmp_path / "logs")
    return tmp_path / "logs"


def flat(logs: Logs) -> dict[str, np.ndarray]:
    parts: dict[str, np.ndarray] = {}
    for part in (logs.events, logs.impressions):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            inner = value if isinstance(value, dict) else {"": value}
            parts |= {f"{type(part).__name__}.{field.name}.{name}": column for name, column in inner.items()}
    return parts


def test_written_logs_read_the_same(logs: Logs, folder: Path) -> None:
    again = read_logs(folder)
    assert again.schema == logs.schema
    ours, theirs = flat(logs), flat(again)
    assert ours.keys() == theirs.keys()
    for name, column in ours.items():
        assert theirs[name].dtype == column.dtype, name
        assert np.array_equal(theirs[name], column), name
    assert sorted(path.name for path in folder.parent.iterdir()) == ["logs"]
    table = pq.read_table(folder / "events.parquet")
    assert set(table.column("behaviour").to_pylist()) == {"purchase", "cart", "click"}


def test_existing_folder_stays(logs: Logs, folder: Path) -> None:
    before = (folder / "schema.json").read_bytes()
    with pytest.raises(OutputExistsError, match="logs exists already"):
        write_logs(logs, folder)
    assert (folder / "schema.json").read_bytes() == before


def test_failed_write_leaves_nothing(logs: Logs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pq, "write_table", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_logs(logs, tmp_path / "logs")
    assert list(tmp_path.iterdir()) == []


def test_absent_pyarrow_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "onetrans-export\[serve\]"'):
        read_logs(folder)


def change(path: Path, name: str, edit: Any) -> None:
    table = pq.read_table(path)
    values = table.column(name).to_pylist()
    index = table.column_names.index(name)
    edited = edit(values)
    pq.write_table(table.remove_column(index) if edited is None else table.set_column(index, name, edited), path)


def at_row_3(value: Any) -> Any:
    return lambda values: pa.array([*values[:3], value, *values[4:]])


@pytest.mark.parametrize(
    ("file", "column", "edit", "words"),
    [
        pytest.param(
            "events", "event_price", at_row_3(float("nan")), "events.parquet: event_price of row 3 is nan", id="nan"
        ),
        pytest.param(
            "events", "event_price", at_row_3(None), "events.parquet: event_price of row 3 is null", id="null"
        ),
        pytest.param(
            "events", "event_price", lambda v: None, "events.parquet: column event_price is missing", id="missing"
        ),
        pytest.param(
            "events", "event_item_id", at_row_3(61), "events.parquet: event_item_id of row 3 is 61; ids", id="high"
        ),
        pytest.param(
            "events",
            "event_item_id",
            lambda v: pa.array([float(x) for x in v]),
            "events.parquet: column event_item_id has type double; it takes integers",
            id="float-id",
        ),
        pytest.param(
            "events", "behaviour", at_row_3("view"), "events.parquet: behaviour of row 3 is 'view'", id="behaviour"
        ),
        pytest.param(
            "events",
            "behaviour",
            lambda v: pa.array([0] * len(v)),
            "behaviour has type int64; it takes strings",
            id="behaviour-type",
        ),
        pytest.param(
            "impressions",
            "candidate_tags",
            at_row_3([1, 2, 3, 4, 5]),
            "impressions.parquet: candidate_tags of row 3 has 5 values: [1, 2, 3, 4, 5]",
            id="long-list",
        ),
        pytest.param(
            "impressions",
            "candidate_tags",
            at_row_3([1, None]),
            "candidate_tags of row 3 has a null in its list",
            id="null-in-list",
        ),
        pytest.param(
            "impressions",
            "candidate_tags",
            lambda v: pa.array([1] * len(v)),
            "candidate_tags has type int64; it takes lists of integers",
            id="no-list",
        ),
        pytest.param(
            "impressions",
            "user_age",
            lambda v: pa.array([str(x) for x in v]),
            "impressions.parquet: column user_age has type string",
            id="string-id",
        ),
        pytest.param(
            "impressions",
            "click",
            at_row_3(2),
            "impressions.parquet: click of row 3 is 2; labels are 0 or 1",
            id="label",
        ),
        pytest.param(
            "impressions", "click", lambda v: pa.array([0] * len(v)), "a conversion implies a click", id="conversion"
        ),
    ],
)
def test_wrong_parquet(folder: Path, file: str, column: str, edit: Any, words: str) -> None:
    change(folder / f"{file}.parquet", column, edit)
    with pytest.raises(DataError) as caught:
        read_logs(folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["schema.json", "events.parquet", "impressions.parquet"])
def test_missing_and_broken_files(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"{not json, not parquet")
    with pytest.raises(DataError, match=f"{name} cannot be read as"):
        read_logs(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        read_logs(folder)


def test_wrong_schema_file(folder: Path) -> None:
    (folder / "schema.json").write_text("[1]")
    with pytest.raises(DataError, match=r"schema.json holds \[1\] \(list\)"):
        read_logs(folder)
    (folder / "schema.json").write_text('{"behaviours": ["click"]}')
    with pytest.raises(DataError, match=r"schema.json: the feature schema cannot be read: 'event'"):
        read_logs(folder)


def small_logs(**changes: Any) -> Logs:
    """Two users; user 7 acts at 10, 20, 20, 30 and is asked at 20 and 31, user 9 has no event and is asked at 5."""
    item = Feature(name="item_id", kind="categorical", vocab=10, dim=2)
    age = Feature(name="age", kind="categorical", vocab=10, dim=2)
    schema = FeatureSchema(behaviours=("buy", "click"), event=(item,), user=(age,), candidate=(item,))
    shown = {
        "request_id": [2, 1, 2, 1, 5],
        "user_id": [7, 7, 7, 7, 9],
        "timestamp": [31, 20, 31, 20, 5],
        "user": {"age": [3, 2, 3, 2, 4]},
        "candidate": {"item_id": [1, 2, 3, 4, 5]},
        "click": [1, 0, 0, 1, 0],
        "conversion": [1, 0, 0, 0, 0],
    }
    return Logs(
        schema=schema,
        events=Events(
            user_id=np.array([7, 7, 7, 7, 8]),
            timestamp=np.array([30, 10, 20, 20, 1]),
            behaviour=np.array([0, 1, 0, 1, 1]),
            features={"item_id": np.array([4, 1, 2, 3, 9])},
        ),
        impressions=Impressions(**(shown | changes)),
    )


def test_history_is_strictly_before_the_request() -> None:
    requests = Requests(small_logs(), max_history=100)
    assert requests.index.request_id.tolist() == [5, 1, 2]
    assert requests.index.user_id.tolist() == [9, 7, 7]
    assert [requests.history(r)["item_id"].tolist() for r in range(3)] == [[], [1], [1, 2, 3, 4]]
    assert requests.history(2)["behaviour"].tolist() == [1, 0, 1, 0]


def test_intent_history() -> None:
    requests = Requests(small_logs(), merge="intent", max_history=100)
    assert requests.history(2)["behaviour"].tolist() == [0, 0, 3, 1, 1]
    assert requests.history(2)["item_id"].tolist() == [2, 4, 0, 1, 3]
    batch = requests.encode([2, 0])
    assert batch.inputs["event_item_id"].tolist() == [[2, 4, 0, 1, 3], [0, 0, 0, 0, 0]]


def test_batch_labels_and_mask() -> None:
    batch = Requests(small_logs(), max_history=3).encode([2, 0, 1])
    assert batch.inputs["candidate_item_id"].tolist() == [[1, 3], [5, 0], [2, 4]]
    assert batch.labels["click"].tolist() == [[1, 0], [0, 0], [0, 1]]
    assert batch.labels["conversion"].tolist() == [[1, 0], [0, 0], [0, 0]]
    assert batch.mask.tolist() == [[True, True], [True, False], [True, True]]
    assert batch.inputs["user_age"].tolist() == [3, 4, 2]
    assert batch.inputs["event_item_id"].tolist() == [[2, 3, 4], [0, 0, 0], [1, 0, 0]]
    assert batch.inputs["history_start"].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"user_id": [7, 7, 8, 7, 9]}, "user_id of row 2 differs within request 2", id="user"),
        pytest.param({"timestamp": [31, 20, 31, 21, 5]}, "timestamp of row 3 differs within request 1", id="time"),
        pytest.param({"user": {"age": [3, 2, 3, 1, 4]}}, "user_age of row 3 differs within request 1", id="feature"),
    ],
)
def test_requests_must_agree_with_themselves(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        index_requests(small_logs(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param(
            {"conversion": [0, 1, 0, 0, 0]}, "impressions: conversion of row 1 is 1 and its click is 0", id="label"
        ),
        pytest.param({"click": [1, 0]}, "click has 2 values and request_id has 5", id="ragged"),
        pytest.param({"user": {}}, "impressions: feature 'age' is missing", id="missing"),
        pytest.param({"timestamp": [1.5] * 5}, "impressions: timestamp of row 0 is 1.5", id="float-time"),
    ],
)
def test_wrong_logs_are_refused_when_made(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        small_logs(**changes)
    assert words in str(caught.value)


def test_user_feature_called_id() -> None:
    logs = small_logs()
    schema = dataclasses.replace(logs.schema, user=(Feature(name="id", kind="numeric"),))
    with pytest.raises(ConfigError, match="'id' collides"):
        dataclasses.replace(logs, schema=schema)


def test_split_by_time(logs: Logs) -> None:
    train, held_out = split_by_time(logs, 0.75)
    times = index_requests(logs).timestamp
    assert np.array_equal(np.concatenate([train, held_out]), np.arange(240))
    assert times[train].max() < times[held_out].min()
    assert abs(len(train) - 180) <= 2
    with pytest.raises(ConfigError, match=r"fraction 1\.5"):
        split_by_time(logs, 1.5)
    with pytest.raises(DataError, match=r"3 requests cannot be split by time at fraction 0\.1"):
        split_by_time(small_logs(), 0.1)


@pytest.mark.parametrize("chunk", [1, 8])
@pytest.mark.parametrize("merge", ["time", "intent"])
def test_batch_equals_the_same_requests_by_hand(logs: Logs, folder: Path, merge: Any, chunk: int) -> None:
    """Training's fast path against the path of serving: the JSON-like border, merge and encode."""
    requests = Requests(logs, merge=merge, max_history=20, chunk=chunk)
    chosen = np.random.default_rng(3).permutation(len(requests))[:63]
    batch = requests.encode(chosen)
    stated = read_requests(folder, logs.schema)
    tokens = [merge_tokens(logs.schema, parse_history(logs.schema, stated[r].history), merge) for r in chosen]
    pyramid = Pyramid(max_history=20, keep=(20,), chunk=chunk)
    starts = [pyramid.starts(len(t["behaviour"]))[0] for t in tokens]
    expected = encode_tokens(logs.schema, tokens, starts)
    expected |= encode_users(logs.schema, [stated[r].profile for r in chosen])
    candidates, counts = encode_candidates(logs.schema, [stated[r].candidates for r in chosen])
    expected |= candidates
    assert set(batch.inputs) == {spec.name for spec in input_specs(logs.schema)}
    assert max(starts) > 0
    assert np.array_equal(batch.mask.sum(axis=1), counts)
    for name, column in expected.items():
        assert batch.inputs[name].dtype == column.dtype, name
        assert np.array_equal(batch.inputs[name], column), name


def test_requests_of_a_log_survive_json(logs: Logs, folder: Path, tmp_path: Path) -> None:
    stated = read_requests(folder, logs.schema)[100:110]
    write_requests(tmp_path / "requests.json", stated)
    again = read_requests(tmp_path / "requests.json", logs.schema)
    for ours, theirs in zip(stated, again, strict=True):
        assert (ours.user, ours.request) == (theirs.user, theirs.request)
        before, after = parse_history(logs.schema, ours.history), parse_history(logs.schema, theirs.history)
        assert all(np.array_equal(before[name], after[name]) for name in before)
        before, after = (encode_candidates(logs.schema, [r.candidates])[0] for r in (ours, theirs))
        assert all(np.array_equal(before[name], after[name]) for name in before)
    with pytest.raises(OutputExistsError, match=r"requests\.json exists already"):
        write_requests(tmp_path / "requests.json", stated)


def test_request_that_json_cannot_hold(tmp_path: Path) -> None:
    request = Request(history=[], profile={"age": float("nan")}, candidates=[{"item_id": 1}])
    with pytest.raises(DataError, match="cannot be written as JSON: Out of range float"):
        write_requests(tmp_path / "r.json", [request])
    assert list(tmp_path.iterdir()) == []


def test_log_of_another_schema(folder: Path, logs: Logs) -> None:
    wider = [dataclasses.replace(f, dim=99) if f.table == "tags" else f for f in logs.schema.candidate]
    assert read_requests(folder, dataclasses.replace(logs.schema, candidate=tuple(wider)))
    other = [dataclasses.replace(f, vocab=99) if f.table == "tags" else f for f in logs.schema.candidate]
    with pytest.raises(DataError, match=r"candidate feature tags is .*201, 4.* in the log and .*99, 4.* in the model"):
        read_requests(folder, dataclasses.replace(logs.schema, candidate=tuple(other)))


REQUEST: dict[str, Any] = {
    "history": [{"behaviour": "click", "timestamp": 3, "item_id": 1}],
    "profile": {"age": 2},
    "candidates": [{"item_id": 4}],
}


@pytest.mark.parametrize("wrap", [lambda r: r, lambda r: [r], lambda r: {"requests": [r]}], ids=["one", "list", "key"])
def test_request_files(tmp_path: Path, wrap: Any) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(wrap(REQUEST | {"user": "u1"})))
    (request,) = read_requests(path, small_logs().schema)
    assert isinstance(request, Request)
    assert (request.user, request.request, request.candidates) == ("u1", "", [{"item_id": 4}])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param('[{"history": [],\n }]', "r.json is not JSON: ", id="comma"),
        pytest.param('[{"history": [],\n }]', "line 2, column 2", id="line"),
        pytest.param("[" * 100_000, "nested too deeply", id="deep"),
        pytest.param("[]", "r.json holds no request", id="none"),
        pytest.param("[3]", "request 0 is 3; give an object with the keys history, profile, candidates", id="number"),
        pytest.param('{"requests": 3}', "'requests' is 3; give a list", id="requests-number"),
        pytest.param('{"requests": [], "model": 1}', "unknown key 'model' beside 'requests'", id="beside"),
        pytest.param(
            json.dumps([REQUEST, REQUEST | {"histori": 1}]),
            "request 1: unknown key 'histori'; known are history",
            id="key",
        ),
        pytest.param(
            json.dumps({"history": [], "profile": {"age": 1}}), "request 0: key 'candidates' is missing", id="missing"
        ),
        pytest.param(json.dumps(REQUEST | {"user": 7}), "request 0: user is 7; give a string", id="user"),
        pytest.param("\ud800".encode("utf-8", "surrogatepass") + b"{", "cannot be read as JSON", id="not-utf8"),
    ],
)
def test_wrong_request_files(tmp_path: Path, text: str | bytes, words: str) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as caught:
        read_requests(path, small_logs().schema)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"history": 7}, "history is 7; give a list", id="history"),
        pytest.param({"profile": {"age": 10}}, "profile: age of user 0 is 10; ids", id="profile"),
        pytest.param(
            {"candidates": [{"item_id": 4}, {"item_id": 10}]},
            "candidates: item_id of candidate 1 is 10",
            id="candidate",
        ),
    ],
)
def test_wrong_values_are_found_once_and_say_where_they_stand(tmp_path: Path, change: Any, words: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps([REQUEST, REQUEST | change]))
    schema = small_logs().schema
    encoder = RequestEncoder(schema=schema, merge="time", pyramid=Pyramid(max_history=8, keep=(8,), chunk=1))
    good, wrong = read_requests(path, schema)
    assert encoder.inputs([encoder.parse(good)])["candidate_item_id"].tolist() == [[4]]
    with pytest.raises(DataError) as caught:
        encoder.parse(wrong, "request 5")
    assert str(caught.value).startswith(f"{path}: request 1: {words}")
    assert "\n" not in str(caught.value)


def test_absent_request_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"r\.json is missing; give a JSON file"):
        read_requests(tmp_path / "r.json", small_logs().schema)
