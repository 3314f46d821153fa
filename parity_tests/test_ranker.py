"""The Ranker gives the reference's scores, whatever the sizes, the company, the form of the request or the thread."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onetrans.errors import DataError
from onetrans.export.models.onetrans import run_model
from onetrans.features.encode import encode_candidates, encode_tokens, encode_users
from onetrans.features.merge import merge_tokens, parse_history
from onetrans.features.requests import Request
from onetrans.model.onetrans import OneTrans
from onetrans.runtime import Ranker, Scores
from onetrans.runtime.backends.base import BackendOptions, StatePool
from parity_tests.conftest import as_rows, request_of

LENGTHS = (0, 1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 500)
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def ranker(tiny_bundle: Path) -> Ranker:
    return Ranker.open(tiny_bundle, options=BackendOptions(threads=1))


@pytest.fixture(scope="module")
def gold_model(tiny_model: OneTrans) -> OneTrans:
    return copy.deepcopy(tiny_model).double()


def make(ranker: Ranker, events: int, candidates: int, seed: int = 0) -> Request:
    return request_of(ranker.bundle.manifest.schema, events=events, candidates=candidates, seed=seed)


def score(ranker: Ranker, request: Request) -> Scores:
    return ranker.rank(history=request.history, profile=request.profile, candidates=request.candidates)


def relative(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """Euclidean norm of the difference over that of what is expected, all tasks together."""
    assert found.keys() == expected.keys()
    a, b = (np.concatenate([np.ravel(side[task]) for task in expected]) for side in (found, expected))
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def spread(scores: Scores) -> float:
    return float(max(np.ptp(logits) for logits in scores.logits.values()))


@pytest.mark.parametrize("candidates", [1, 7, 100])
@pytest.mark.parametrize("events", LENGTHS)
def test_scores_are_the_references(ranker: Ranker, gold_model: OneTrans, events: int, candidates: int) -> None:
    """Against the whole history in one pass of the float64 model, whose inputs are made here step by step."""
    request = make(ranker, events, candidates, seed=events)
    schema, config = gold_model.config.schema, gold_model.config
    tokens = merge_tokens(schema, parse_history(schema, request.history), "time")
    start = config.pyramid.starts(events)[0]
    inputs = {
        **encode_tokens(schema, [tokens], [start]),
        **encode_users(schema, [request.profile]),
        **encode_candidates(schema, [request.candidates])[0],
    }
    assert inputs["history_length"][0] == events - start
    expected = {task: logits[0] for task, logits in run_model(gold_model, inputs).items()}
    found = score(ranker, request)
    assert {task: (v.dtype, v.shape) for task, v in found.logits.items()} == dict.fromkeys(
        ("ctr", "cvr"), (np.dtype(np.float32), (candidates,))
    )
    assert relative(found.logits, expected) <= 1e-5
    assert found.seconds.keys() == {"encode", "prefill", "decode"}
    assert all(seconds > 0 for seconds in found.seconds.values())
    if candidates > 1:
        assert spread(found) > 0.05  # the comparison above says something about each candidate


def test_history_and_profile_matter(ranker: Ranker) -> None:
    request, other = make(ranker, 100, 50, seed=1), make(ranker, 100, 50, seed=2)
    own = score(ranker, request).logits["ctr"]
    for changed in (
        ranker.rank(history=other.history, profile=request.profile, candidates=request.candidates),
        ranker.rank(history=request.history, profile=other.profile, candidates=request.candidates),
    ):
        assert np.abs(changed.logits["ctr"] - own).mean() > 0.02


def window(ranker: Ranker, request: Request, first: int, last: int) -> Arrays:
    """User-scope inputs with the events from `first` up to `last` of the history."""
    schema = ranker.bundle.manifest.schema
    tokens = merge_tokens(schema, parse_history(schema, request.history), "time")
    known = {name: column[:last] for name, column in tokens.items()}
    return {**encode_tokens(schema, [known], [first]), **encode_users(schema, [request.profile])}


def start_of(ranker: Ranker, events: int) -> int:
    return ranker.bundle.manifest.pyramid.starts(events)[0]


def user_inputs(ranker: Ranker, request: Request) -> Arrays:
    return ranker.encoder.user_inputs([ranker.encoder.parse(request)])


def candidate_inputs(ranker: Ranker, request: Request) -> Arrays:
    return ranker.encoder.candidate_inputs([ranker.encoder.parse(request)])[0]


def prefilled(ranker: Ranker, request: Request, events: int) -> StatePool:
    """A pool whose one slot holds the state of the first `events` events."""
    pool = ranker.backend.allocate(1)
    ranker.backend.prefill(pool, [0], window(ranker, request, start_of(ranker, events), events))
    return pool


def grown(ranker: Ranker, request: Request, steps: list[int]) -> StatePool:
    """The state of steps[0] events, with the events up to each further step appended."""
    pool = prefilled(ranker, request, steps[0])
    for before, after in itertools.pairwise(steps):
        ranker.backend.append(pool, [0], window(ranker, request, before, after))
    return pool


def decode(ranker: Ranker, pool: StatePool, candidates: Arrays) -> Arrays:
    users, count = next(iter(candidates.values())).shape[:2]
    return ranker.backend.decode(pool, range(users), candidates, np.full(users, count))


APPENDS = ([64, 127], [64, 65, 66, 100, 127], [1, 2], [1, 63], [128, 191], [192, 193, 255], [500, 511], [7, 7])


@pytest.mark.parametrize("steps", APPENDS, ids=lambda steps: "-".join(map(str, steps)))
def test_an_appended_state_is_the_prefilled_one(ranker: Ranker, steps: list[int]) -> None:
    """State by state; which are equal bit by bit is printed (`pytest -s`), since ONNX Runtime promises none."""
    assert steps[0] == steps[-1] or ranker.bundle.manifest.pyramid.can_append(steps[0], steps[-1])
    request = make(ranker, steps[-1], 50, seed=steps[-1])
    fresh, appended = prefilled(ranker, request, steps[-1]), grown(ranker, request, steps)
    expected, found = fresh.read(0), appended.read(0)
    assert found.keys() == expected.keys()
    lengths = expected["lengths"]
    errors = {}
    for tensor in ranker.bundle.manifest.state:
        name = tensor.name
        a, b = found[name], expected[name]
        if tensor.is_window:
            tokens = next(axis for axis, dim in enumerate(tensor.dims) if axis and isinstance(dim, str))
            valid = np.arange(int(lengths[0, tensor.state.layer]))
            a, b = a.take(valid, tokens), b.take(valid, tokens)
        assert a.shape == b.shape, name
        errors[name] = float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0))
    exact = [name for name, error in errors.items() if error == 0.0]
    print(f"append {steps}: bit-equal {', '.join(exact)}; worst {max(errors.values()):.1e} relative")
    assert max(errors.values()) <= 1e-6, errors
    assert {"lengths", "k0", "v0"} <= {*exact, *(name for name, error in errors.items() if error <= 2e-7)}
    candidates = candidate_inputs(ranker, request)
    assert relative(decode(ranker, appended, candidates), decode(ranker, fresh, candidates)) <= 2e-6


def test_a_failed_append_leaves_the_state_as_it_was(ranker: Ranker) -> None:
    """The second of two users brings an id that no embedding has, in the last group that is computed."""
    request = make(ranker, 127, 9)
    pool = ranker.backend.allocate(2)
    first = window(ranker, request, start_of(ranker, 64), 64)
    ranker.backend.prefill(pool, [0, 1], {name: np.repeat(value, 2, axis=0) for name, value in first.items()})
    before = [pool.read(slot) for slot in (0, 1)]
    new = {n: np.repeat(v, 2, axis=0) for n, v in window(ranker, request, 64, 127).items()}
    new["history_length"][1] = 3
    new["event_item_id"][1] = 10**9
    with pytest.raises(Exception, match="out of"):
        ranker.backend.append(pool, [0, 1], new)
    after = [pool.read(slot) for slot in (0, 1)]
    assert all(np.array_equal(a[name], b[name]) for a, b in zip(before, after, strict=True) for name in a)


@pytest.mark.parametrize("events", [0, 1, 64, 65, 193])
def test_a_candidates_score_does_not_depend_on_its_company(ranker: Ranker, events: int) -> None:
    request = make(ranker, events, 100, seed=events)
    together = score(ranker, request).logits
    allowed = 4 * np.spacing(np.float32(max(np.abs(logits).max() for logits in together.values())))
    unequal = set()
    for few in (*([index] for index in range(0, 100, 9)), [3, 50], list(range(99, -1, -1)), list(range(0, 100, 7))):
        chosen = {name: column[few] for name, column in request.candidates.items()}
        apart = ranker.rank(history=request.history, profile=request.profile, candidates=chosen).logits
        for task, logits in together.items():
            assert apart[task].shape == (len(few),)
            assert np.abs(apart[task] - logits[few]).max() <= allowed, (task, few)
            unequal |= set() if np.array_equal(apart[task], logits[few]) else {len(few)}
    print(f"{events} events: bit-equal in every company{f' but of {unequal} candidates' if unequal else ''}")


def test_equal_candidates_get_equal_scores_and_keep_their_order(ranker: Ranker) -> None:
    request = make(ranker, 80, 1, seed=4)
    same = {name: np.repeat(column, 37, axis=0) for name, column in request.candidates.items()}
    scores = ranker.rank(history=request.history, profile=request.profile, candidates=same)
    assert all(np.unique(logits).size == 1 for logits in scores.logits.values())
    assert scores.ranking().tolist() == list(range(37))


def test_ranking_is_best_first_and_ties_keep_the_order_given() -> None:
    ctr = np.array([0.5, 2.0, -1.0, 2.0, 0.5], np.float32)
    cvr = np.array([1.0, 0.0, 3.0, 2.0, -4.0], np.float32)
    scores = Scores({"ctr": ctr, "cvr": cvr}, {})
    assert scores.ranking().tolist() == [1, 3, 0, 4, 2]
    assert scores.ranking("ctr").tolist() == [1, 3, 0, 4, 2]
    assert scores.ranking("cvr").tolist() == [2, 3, 0, 1, 4]


def test_probabilities_are_the_logits_sigmoid() -> None:
    logits = np.array([-200.0, -3.0, 0.0, 1.5, 200.0], np.float32)
    with np.errstate(all="raise", under="ignore"):
        found = Scores({"ctr": logits}, {}).probabilities()["ctr"]
    assert found.dtype == np.float32
    assert found.tolist() == [0.0, *np.float32([0.047425873, 0.5, 0.81757448]).tolist(), 1.0]


def test_a_batch_of_users_gives_what_each_gets_alone(ranker: Ranker) -> None:
    lengths = [0, 500, 1, 64, 130, 63]
    requests = [make(ranker, events, 23, seed=index) for index, events in enumerate(lengths)]
    users = [user_inputs(ranker, request) for request in requests]
    candidates = [candidate_inputs(ranker, request) for request in requests]
    batch = {name: np.concatenate([c[name] for c in candidates]) for name in candidates[0]}
    widest = max(user["event_behaviour"].shape[1] for user in users)
    user_batch = {}
    for name in users[0]:
        columns = [user[name] for user in users]
        if name.startswith("event_"):
            columns = [np.pad(column, ((0, 0), (0, widest - column.shape[1]))) for column in columns]
        user_batch[name] = np.concatenate(columns)
    pool = ranker.backend.allocate(len(requests))
    ranker.backend.prefill(pool, range(len(requests)), user_batch)
    together = decode(ranker, pool, batch)
    for index, request in enumerate(requests):
        alone = score(ranker, request).logits
        assert relative({task: logits[index] for task, logits in together.items()}, alone) <= 2e-6, lengths[index]


def test_what_stands_in_the_padding_does_not_matter(ranker: Ranker) -> None:
    """Twelve more columns of real-looking ids and huge prices behind the history change nothing, in any state."""
    request = make(ranker, 65, 40, seed=5)
    user, candidates = user_inputs(ranker, request), candidate_inputs(ranker, request)
    clean, dirty = dict(user), dict(user)
    for name, column in user.items():
        if name.startswith("event_"):
            clean[name] = np.pad(column, ((0, 0), (0, 12)))
            dirty[name] = np.pad(column, ((0, 0), (0, 12)), constant_values=1e6 if column.dtype == np.float32 else 1)
    pools = [ranker.backend.allocate(1) for _ in range(2)]
    for pool, inputs in zip(pools, (clean, dirty), strict=True):
        ranker.backend.prefill(pool, [0], inputs)
    a, b = (decode(ranker, pool, candidates) for pool in pools)
    assert all(np.array_equal(a[task], b[task]) for task in a)
    new = window(ranker, make(ranker, 77, 1, seed=5), 65, 77)
    for pool in pools:
        ranker.backend.append(pool, [0], new)
    a, b = (decode(ranker, pool, candidates) for pool in pools)
    assert all(np.array_equal(a[task], b[task]) for task in a)
    assert relative(score(ranker, request).logits, {task: v[0] for task, v in b.items()}) > 1e-4


@pytest.mark.parametrize("events", [0, 1, 150])
def test_rows_of_dicts_equal_columns(ranker: Ranker, events: int) -> None:
    request = make(ranker, events, 9, seed=6)
    rows = as_rows(request.history)
    assert len(rows) == events
    by_rows = ranker.rank(history=rows, profile=request.profile, candidates=as_rows(request.candidates))
    by_columns = score(ranker, request)
    for task, logits in by_columns.logits.items():
        assert np.array_equal(by_rows.logits[task], logits)


def test_threads_do_not_disturb_each_other(ranker: Ranker) -> None:
    requests = [make(ranker, events, candidates, seed=events) for events in (0, 5, 130, 500) for candidates in (1, 60)]
    expected = [score(ranker, request).logits for request in requests]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda index: score(ranker, requests[index % len(requests)]).logits, range(160)))
    for index, logits in enumerate(found):
        for task, value in logits.items():
            assert np.array_equal(value, expected[index % len(requests)][task]), (index, task)


def changed(columns: Mapping[str, Any], name: str, values: Any) -> dict[str, Any]:
    """Columns with one replaced, or left out where `values` is None."""
    rest = {key: value for key, value in columns.items() if key != name}
    return rest if values is None else {**rest, name: values}


BAD_NUMBERS = {
    "nan": ([0.0, float("nan"), 1.0], "price of {unit} 1 is nan; numeric features take finite float32 numbers"),
    "infinite": ([0.0, 1.0, float("-inf")], "price of {unit} 2 is -inf; numeric features take finite"),
    "beyond-float32": ([1e39, 0.0, 0.0], "price of {unit} 0 is 1e+39; numeric features take finite float32"),
    "strings": (["1", "2", "3"], "price of {unit} 0 is '1' (str); numeric features take"),
    "booleans": (np.array([True, False, True]), "price of {unit} 0 is True; numeric features take"),
    "nulls": ([None, 1.0, 2.0], "price of {unit} 0 is None (NoneType); numeric features take"),
    "missing": (None, "feature 'price' is missing; needed are "),
    "short": ([0.0, 1.0], "price has 2 values and"),
}


@pytest.mark.parametrize("part", ["history", "candidates"])
@pytest.mark.parametrize(("values", "expected"), BAD_NUMBERS.values(), ids=BAD_NUMBERS)
def test_wrong_numbers_are_named(ranker: Ranker, part: str, values: Any, expected: str) -> None:
    request = make(ranker, 3, 3)
    given = {"history": request.history, "candidates": request.candidates}
    given[part] = changed(given[part], "price", values)
    with pytest.raises(DataError) as caught:
        ranker.rank(profile=request.profile, **given)
    wanted = expected.format(unit={"history": "event", "candidates": "candidate"}[part])
    if "values and" in expected:
        assert "has 3" in str(caught.value)
        assert "one value per" in str(caught.value)
    else:
        assert wanted in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("item_id", np.array([1.0, 2.0, 3.0]), "item_id of candidate 0 is 1.0; ids are integers from 0 to 2000"),
        ("item_id", [1, 2, 2001], "item_id of candidate 2 is 2001; ids are integers from 0 to 2000"),
        ("item_id", [-1, 2, 3], "item_id of candidate 0 is -1; ids are integers from 0 to 2000"),
        ("tags", [[1], [1, 2, 3, 4, 5], []], "tags of candidate 1 has 5 values: [1, 2, 3, 4, 5]; multi features take"),
        ("tags", None, "feature 'tags' is missing"),
        ("colour", [1, 2, 3], "unknown feature 'colour'"),
    ],
    ids=["float-ids", "beyond-vocab", "negative", "too-many-tags", "missing", "unknown"],
)
def test_wrong_candidates_are_named(ranker: Ranker, name: str, values: Any, expected: str) -> None:
    request = make(ranker, 3, 3)
    with pytest.raises(DataError) as caught:
        ranker.rank(
            history=request.history, profile=request.profile, candidates=changed(request.candidates, name, values)
        )
    assert expected in str(caught.value)


@pytest.mark.parametrize("part", ["history", "profile", "candidates"])
@pytest.mark.parametrize("value", [None, 3, "text", [3]], ids=repr)
def test_nonsense_is_refused(ranker: Ranker, part: str, value: Any) -> None:
    request = make(ranker, 3, 3)
    given = {"history": request.history, "profile": request.profile, "candidates": request.candidates}
    with pytest.raises(DataError, match=f"^{part}"):
        ranker.rank(**{**given, part: value})


def test_counts_of_candidates_out_of_bounds(ranker: Ranker) -> None:
    request = make(ranker, 3, 2048)
    assert score(ranker, request).logits["ctr"].shape == (2048,)
    with pytest.raises(DataError, match="2049 candidates were given; this bundle takes 1 to 2048: score them in parts"):
        score(ranker, make(ranker, 3, 2049))
    none = {name: column[:0] for name, column in request.candidates.items()}
    for empty in (none, []):
        with pytest.raises(DataError, match="there are 0 candidates; give at least one to score"):
            ranker.rank(history=request.history, profile=request.profile, candidates=empty)


REFUSING = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "onnxscript", "pyarrow"):
            raise ImportError(f"{name} is refused")

sys.meta_path.insert(0, Refuse())
from onetrans.cli.main import main
main()
"""


def test_scoring_needs_no_torch_onnx_or_pyarrow(ranker: Ranker, tiny_bundle: Path, tmp_path: Path) -> None:
    request = make(ranker, 70, 5)
    given = {
        "history": as_rows(request.history),
        "profile": {name: np.asarray(value).tolist() for name, value in request.profile.items()},
        "candidates": as_rows(request.candidates),
    }
    (tmp_path / "request.json").write_text(json.dumps(given))
    command = [sys.executable, "-c", REFUSING, "score", tiny_bundle, "--input", tmp_path / "request.json", "--json"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["requests"][0]["logits"]
    expected = score(ranker, request).logits
    assert {task: np.float32(values).tolist() for task, values in found.items()} == {
        task: values.tolist() for task, values in expected.items()
    }
