"""The synthetic log: what it follows from, and what can be learnt from it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from onetrans.errors import ConfigError
from onetrans.features.batches import Requests, index_requests, split_by_time
from onetrans.features.popularity import popularity_scores
from onetrans.features.synthetic.logs import generate, log_schema, simulate
from onetrans.features.synthetic.run import EPOCH, Simulation


@pytest.fixture(scope="module")
def simulation() -> Simulation:
    return simulate(users=600, requests_per_user=20, seed=11)


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve, ties counting half."""
    _, which, count = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[which]
    positives = int(labels.sum())
    surplus = ranks[labels == 1].sum() - positives * (positives + 1) / 2
    return float(surplus / (positives * (len(labels) - positives)))


def test_auc_of_known_ranks() -> None:
    labels = np.array([0, 0, 1, 1])
    assert auc(np.array([0.1, 0.4, 0.35, 0.8]), labels) == 0.75
    assert auc(np.ones(4), labels) == 0.5


def test_one_seed_one_log() -> None:
    sizes: dict[str, Any] = {"users": 30, "requests_per_user": 4, "items": 50}
    first, second, other = generate(seed=1, **sizes), generate(seed=1, **sizes), generate(seed=2, **sizes)
    assert np.array_equal(first.events.features["item_id"], second.events.features["item_id"])
    assert np.array_equal(first.impressions.click, second.impressions.click)
    assert np.array_equal(first.impressions.candidate["popularity"], second.impressions.candidate["popularity"])
    assert not np.array_equal(first.impressions.click, other.impressions.click)


def test_rates(simulation: Simulation) -> None:
    shown = simulation.logs.impressions
    assert 0.10 < shown.click.mean() < 0.20
    assert 0.10 < shown.conversion[shown.click == 1].mean() < 0.20
    # Labels are drawn from the probabilities: their means differ by chance alone.
    spread = np.sqrt((simulation.click_probability * (1 - simulation.click_probability)).sum()) / len(shown.click)
    assert abs(shown.click.mean() - simulation.click_probability.mean()) < 4 * spread


def test_history_beats_popularity(simulation: Simulation) -> None:
    """The truth is far above popularity, and a plain count over the history reaches part of the way."""
    logs = simulation.logs
    train, held_out = split_by_time(logs, 0.8)
    rows = index_requests(logs).rows(held_out)
    labels = logs.impressions.click[rows]
    oracle = auc(simulation.click_probability[rows], labels)
    popular = auc(popularity_scores(logs, train, held_out), labels)
    batch = Requests(logs, max_history=64).encode(held_out)
    age = batch.inputs["history_length"][:, None] - 1 - np.arange(batch.inputs["event_category"].shape[1])
    weights = np.where(age >= 0, 0.02 + 0.6 ** np.maximum(age, 0), 0.0)
    past, asked = batch.inputs["event_category"][:, None] - 1, batch.inputs["candidate_category"][..., None] - 1
    alike = 0.5 * (past == asked) + 0.5 * (past % 10 == asked % 10)
    matched = (weights[:, None] * alike).sum(axis=2) / np.maximum(weights.sum(axis=1), 1e-9)[:, None]
    counted = auc(matched[batch.mask], batch.labels["click"][batch.mask])
    assert oracle > 0.78
    assert 0.55 < popular < 0.68
    assert counted > popular + 0.06
    assert oracle > counted + 0.03


def test_conversions_can_be_learnt(simulation: Simulation) -> None:
    clicked = simulation.logs.impressions.click == 1
    assert auc(simulation.conversion_probability[clicked], simulation.logs.impressions.conversion[clicked]) > 0.65


def test_order_of_the_history_matters(simulation: Simulation) -> None:
    """A candidate of the category clicked last is clicked more often than one of the category before ten others."""
    logs = simulation.logs
    requests = Requests(logs, max_history=1000)
    batch = requests.encode(np.flatnonzero(requests.encode(np.arange(len(requests))).inputs["history_length"] > 20))
    past, length = batch.inputs["event_category"], batch.inputs["history_length"]
    last, early = (np.take_along_axis(past, (length - back)[:, None], axis=1) for back in (1, 15))
    asked, click = batch.inputs["candidate_category"], batch.labels["click"]
    only_last, only_early = (asked == last) & (asked != early), (asked == early) & (asked != last)
    assert click[only_last].mean() > 1.15 * click[only_early].mean()


def test_histories_from_none_to_hundreds(simulation: Simulation) -> None:
    requests = Requests(simulation.logs, max_history=1000)
    lengths = requests.encode(np.arange(len(requests))).inputs["history_length"]
    assert lengths.min() == 0
    assert (lengths == 0).mean() < 0.1
    assert 20 < np.median(lengths) < 80
    assert 200 < lengths.max() < 1000


def test_events_follow_from_clicks(simulation: Simulation) -> None:
    """Every click, and every conversion, left its event just after the request."""
    shown, events = simulation.logs.impressions, simulation.logs.events
    columns = (events.user_id, events.behaviour, events.timestamp, events.features["item_id"])
    done = set(zip(*(column.tolist() for column in columns), strict=True))
    position = shown.candidate["position"]
    for behaviour, label, delay in ((2, shown.click, 0), (0, shown.conversion, 4)):
        rows = np.flatnonzero(label)[:500]
        for row in rows.tolist():
            time = int(shown.timestamp[row]) + 5 * int(position[row]) + delay
            assert (int(shown.user_id[row]), behaviour, time, int(shown.candidate["item_id"][row])) in done
    first = shown.timestamp == shown.timestamp.min()
    assert events.timestamp.min() < EPOCH <= shown.timestamp[first][0]


def test_popularity_knows_only_the_past(simulation: Simulation) -> None:
    """Recounted from the events of earlier steps, which all precede the step's requests."""
    shown, events = simulation.logs.impressions, simulation.logs.events
    assert np.all(shown.candidate["popularity"] >= 0)
    # After the first step, the counts are those of the events before the epoch.
    before = events.timestamp < EPOCH
    counts = np.bincount(events.features["item_id"][before], minlength=2001)
    first_step = shown.request_id < 600
    expected = np.log1p(counts[shown.candidate["item_id"][first_step]]) / 4
    np.testing.assert_allclose(shown.candidate["popularity"][first_step], expected, rtol=1e-6)


def test_candidates_are_distinct() -> None:
    logs = generate(users=50, requests_per_user=2, items=24, candidates_per_request=12, seed=0)
    items = Requests(logs, max_history=5).encode(np.arange(100)).inputs["candidate_item_id"]
    assert all(len(set(row)) == 12 for row in items.tolist())


def test_popularity_scores_of_known_counts() -> None:
    logs = generate(users=3, requests_per_user=2, items=24, candidates_per_request=2, seed=4)
    train, held_out = split_by_time(logs, 0.5)
    scores = popularity_scores(logs, train, held_out, smoothing=2.0)
    index, shown = index_requests(logs), logs.impressions
    seen = index.rows(train)
    mean = shown.click[seen].mean()
    items = shown.candidate["item_id"]
    for score, row in zip(scores, index.rows(held_out), strict=True):
        same = seen[items[seen] == items[row]]
        assert score == pytest.approx((shown.click[same].sum() + 2.0 * mean) / (len(same) + 2.0))


def test_a_bigger_schema_is_filled() -> None:
    schema = log_schema(items=5000, categories=120, tags=900, item_dim=64, positions=4, tags_width=6)
    logs = generate(users=100, requests_per_user=3, seed=3, schema=schema)
    assert logs.schema == schema
    assert logs.impressions.candidate["tags"].shape == (3000, 6)
    assert logs.impressions.candidate["item_id"].max() > 4000
    assert logs.impressions.candidate["position"].max() == 4
    assert {f.group: scope for scope in ("user", "candidate") for f in getattr(schema, scope)} == {
        "profile": "user",
        "context": "user",
        "item": "candidate",
        "offer": "candidate",
        "placement": "candidate",
    }


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        pytest.param({"users": 0}, "users 0, requests 20 and candidates 10 must be at least 1", id="users"),
        pytest.param({"items": 15}, r"items 15 must be at least twice the candidates \(10\)", id="items"),
        pytest.param({"days": 0.1}, r"days 0\.1 leave 432 s per request of a user; 10 candidates need 1000", id="days"),
        pytest.param({"schema": dataclasses.replace(log_schema(), behaviours=("click",))}, "log_schema", id="schema"),
    ],
)
def test_sizes_that_cannot_be(sizes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        generate(**sizes)
