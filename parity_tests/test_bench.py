"""Measuring: statistics, load, records, reports and the command."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onetrans.bench.load import LoadConfig, file_requests, random_requests
from onetrans.bench.plots import plot_latency
from onetrans.bench.record import dumps, read_record, summarise, write_json
from onetrans.bench.report import latency_markdown
from onetrans.bench.run import bench_ranker, quiet_collector
from onetrans.bench.stats import median, median_ratio, percentiles
from onetrans.errors import ConfigError, DataError, JobError
from onetrans.features.random_requests import first_events
from onetrans.features.requests import write_requests
from onetrans.runtime.backends.base import BackendOptions
from onetrans.runtime.ranker import Ranker
from parity_tests.conftest import error_line, request_of
from parity_tests.records import short_record

Cli = Callable[..., Any]

COLD = ("encode", "prefill", "decode", "whole")  # what runs where nothing is kept


@pytest.fixture(scope="module")
def ranker(tiny_bundle: Path) -> Ranker:
    return Ranker.open(tiny_bundle, options=BackendOptions(threads=1))


@pytest.fixture(scope="module")
def record(ranker: Ranker) -> dict[str, Any]:
    return short_record(ranker)


def write_load(path: Path, ranker: Ranker, counts: list[tuple[int, int]]) -> Path:
    """Requests of (events, candidates), as JSON; behaviours by name, as a caller writes them."""
    schema = ranker.bundle.manifest.schema
    requests = [request_of(schema, events=e, candidates=c, seed=i) for i, (e, c) in enumerate(counts)]
    write_requests(path, requests)
    return path


def brute_percentile(values: list[float], rank: float) -> float:
    ordered = sorted(values)
    place = rank / 100 * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


@pytest.mark.parametrize("count", [20, 63, 200])
def test_percentiles_equal_brute_force(count: int) -> None:
    values = np.random.default_rng(count).exponential(size=count).tolist()
    found = percentiles(values)
    assert list(found) == ["p50", "p95", "p99"]
    for rank in (50, 95, 99):
        estimate = found[f"p{rank}"]
        assert estimate.value == pytest.approx(brute_percentile(values, rank), rel=1e-12)
        assert min(values) <= estimate.low <= estimate.value <= estimate.high <= max(values)
    assert percentiles(values) == found


def test_bootstrap_interval_equals_plain_loop_and_covers_the_truth() -> None:
    values = np.random.default_rng(1).normal(size=40)
    draws = np.random.default_rng(7).integers(0, 40, (2000, 40))
    medians = [float(np.median(values[draw])) for draw in draws]
    found = median(values, seed=7)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(medians, [2.5, 97.5])), rel=1e-12)
    covered = 0
    for seed in range(100):
        estimate = median(np.random.default_rng(100 + seed).normal(loc=3.0, size=50))
        covered += estimate.low <= 3.0 <= estimate.high
    assert 88 <= covered <= 100


def test_paired_ratio_cancels_drift_that_a_ratio_of_medians_keeps() -> None:
    rng = np.random.default_rng(0)
    drift = np.linspace(1, 10, 41) * rng.uniform(0.9, 1.1, 41)
    found = median_ratio(1.25 * drift, drift)
    assert (found.value, found.low, found.high) == pytest.approx((1.25, 1.25, 1.25))
    a, b = rng.uniform(1, 2, 9), rng.uniform(1, 2, 9)
    assert median_ratio(a, b).value == sorted(x / y for x, y in zip(a, b, strict=True))[4]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        pytest.param(lambda: percentiles(range(19)), "19 samples are too few", id="few"),
        pytest.param(lambda: percentiles([]), "0 samples are too few", id="none"),
        pytest.param(lambda: percentiles([1.0] * 30 + [float("nan")]), "nan", id="nan"),
        pytest.param(lambda: median([1.0] * 4), "4 samples are too few", id="few-median"),
        pytest.param(lambda: median_ratio([1.0] * 5, [1.0] * 6), "cannot be paired", id="unpaired"),
        pytest.param(lambda: median_ratio([1.0] * 5, [0.0] * 5), "positive", id="zero"),
    ],
)
def test_statistics_refuse(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call()


def sizes(request: Any) -> tuple[int, int]:
    return len(request.history["timestamp"]), len(next(iter(request.candidates.values())))


def test_load_follows_its_seed_and_stays_in_its_sizes(ranker: Ranker) -> None:
    manifest = ranker.bundle.manifest

    def draw(seed: int, spread: str) -> list[Any]:
        stream = random_requests(LoadConfig(events=9, candidates=5, spread=spread, seed=seed), manifest)
        return [next(stream) for _ in range(60)]

    first, again, other = draw(3, "uniform"), draw(3, "uniform"), draw(4, "uniform")
    np.testing.assert_equal([vars(r) for r in first], [vars(r) for r in again])
    assert [sizes(r) for r in first] != [sizes(r) for r in other]
    assert {sizes(r) for r in draw(0, "fixed")} == {(9, 5)}
    assert {events for events, _ in map(sizes, first)} == set(range(10))
    assert {candidates for _, candidates in map(sizes, first)} == {1, 2, 3, 4, 5}
    with pytest.raises(ConfigError, match="spread 'wide'; allowed: fixed, uniform"):
        LoadConfig(events=1, candidates=1, spread="wide")


def test_bench_ranker_keeps_every_sample_in_order(ranker: Ranker) -> None:
    seen: list[tuple[int, int]] = []
    gc.disable()  # so that none but the bench's own collection runs
    collections = gc.get_stats()[2]["collections"]
    stream = random_requests(LoadConfig(events=4, candidates=3), ranker.bundle.manifest)
    samples = bench_ranker(ranker, stream, warmup=3, progress=lambda *at: seen.append(at))
    assert {name: len(values) for name, values in samples.seconds.items()} == dict.fromkeys(COLD, 200)
    parts = np.sum([samples.seconds[name] for name in ("encode", "prefill", "decode")], axis=0)
    assert (np.array(samples.seconds["whole"]) >= parts).all()
    assert min(map(min, samples.seconds.values())) > 0
    assert seen == [(n, 203) for n in range(1, 204)]
    assert not gc.isenabled()
    assert gc.get_stats()[2]["collections"] == collections + 1
    gc.enable()
    with quiet_collector():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_bench_ranker_repeats_few_requests_and_refuses_none(ranker: Ranker) -> None:
    request = request_of(ranker.bundle.manifest.schema, events=2, candidates=1)
    assert len(bench_ranker(ranker, [request], count=20, warmup=1).seconds["whole"]) == 20
    for arguments in ({"count": 19}, {"count": 20, "warmup": 0}):
        with pytest.raises(ConfigError, match="at least"):
            bench_ranker(ranker, [request], **arguments)
    with pytest.raises(ConfigError, match="no request"):
        bench_ranker(ranker, [])


def test_record_round_trip_is_atomic_and_complete(record: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "deep" / "record.json"
    path.parent.mkdir()
    path.write_text("old", encoding="utf-8")
    write_json(path, record)
    assert read_record(path) == json.loads(dumps(record)) == record
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]
    assert record["summary"] == summarise(record["samples"])
    assert {"commit", "dirty", "date", "cpu", "cores", "memory_bytes", "os", "python", "libraries"} <= set(
        record["environment"]
    )
    assert len(record["bundle"]["config_sha256"]) == len(record["bundle"]["weights_sha256"]) == 64
    assert "off while measuring" in record["garbage_collector"]
    with pytest.raises(JobError, match="could not be written"):
        write_json(path / "below", record)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "JSON"), ("[]", "format"), ('{"format": "onetrans-bench", "version": 99}', "version 99")],
)
def test_foreign_records_are_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        read_record(tmp_path / "r.json")
    with pytest.raises(DataError, match="does not exist"):
        read_record(tmp_path / "none.json")


def test_reports_show_the_record(record: dict[str, Any], tmp_path: Path) -> None:
    text = latency_markdown(record)
    p99 = record["summary"]["decode"]["p99"]
    assert f"{1e3 * p99['value']:.2f} ({1e3 * p99['low']:.2f} – {1e3 * p99['high']:.2f})" in text
    assert "9 events, 5 candidates" in text
    for name in ("a.svg", "b.svg"):
        plot_latency(record, tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert drawn == (tmp_path / "b.svg").read_text(encoding="utf-8")
    for word in ("encode", "prefill", "decode", "whole", "p99", "milliseconds"):
        assert word in drawn
    with pytest.raises(JobError, match="svg"):
        plot_latency(record, tmp_path / "a.txt")


def test_command_prints_a_table_and_writes_its_record(run_cli: Cli, tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    result = run_cli("bench", tiny_bundle, "--events", 5, "--candidates", 3, "--threads", 1, "--record", path)
    assert result.returncode == 0, result.stderr
    for word in ("encode", "prefill", "decode", "whole", "p50", "p95", "p99", "200 requests"):
        assert word in result.stdout
    record = read_record(path)
    assert {name: len(values) for name, values in record["samples"].items()} == dict.fromkeys(COLD, 200)
    assert record["parity"]["worst_relative_error"] < 1e-5


def test_command_prints_one_json_object_and_nothing_else(
    run_cli: Cli, ranker: Ranker, tiny_bundle: Path, tmp_path: Path
) -> None:
    source = write_load(tmp_path / "requests.json", ranker, [(0, 1), (1, 2), (2, 3)])
    result = run_cli("bench", tiny_bundle, "--input", source, "--requests", 20, "--json")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    found = json.loads(result.stdout)
    assert set(found["summary"]) == set(COLD)
    assert found["load"]["input"] == str(source)
    assert "fewer than 200" in result.stderr
    assert "fewer than 200" in found["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--candidates", 0), ("--candidates is 0", "at least 1")),
        (("--candidates", 4096), ("candidates is 4096", "1 to 2048")),
        (("--events", -1), ("--events is -1", "at least 0")),
        (("--events", 128), ("events is 128", "0 to 127")),
        (("--requests", 19), ("--requests is 19", "at least 20")),
        (("--threads", 0), ("--threads is 0", "at least 1")),
        (("--input", "none.json"), ("none.json is missing",)),
        (("--input", "none.json", "--seed", 1), ("--seed", "--input none.json", "drop")),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_command_refuses_in_one_line(
    run_cli: Cli, tiny_bundle: Path, arguments: tuple[object, ...], words: tuple[str, ...]
) -> None:
    line = error_line(run_cli("bench", tiny_bundle, *arguments), 2)
    for word in words:
        assert word in line


def test_file_requests_beyond_the_bounds_are_refused(ranker: Ranker, tmp_path: Path) -> None:
    manifest = dataclasses.replace(ranker.bundle.manifest, bounds={**ranker.bundle.manifest.bounds, "C": (1, 2)})
    source = write_load(tmp_path / "r.json", ranker, [(1, 2), (1, 3)])
    with pytest.raises(DataError, match="request 1 has 3 candidates; this bundle takes 1 to 2"):
        file_requests(source, manifest)


def test_no_speed_from_a_bundle_whose_parity_fails(run_cli: Cli, bundle: Path) -> None:
    from safetensors.numpy import load_file, save_file

    from parity_tests.conftest import rehash

    gold = load_file(bundle / "cases.safetensors")
    moved = ("/reference/", "/eager/")
    wrong = {n: v + v.dtype.type(0.5) if any(part in n for part in moved) else v for n, v in gold.items()}
    save_file(wrong, bundle / "cases.safetensors")
    rehash(bundle)
    line = error_line(run_cli("bench", bundle, "--requests", 20, "--json"), 1)
    assert "parity cases failed" in line


def test_command_with_kept_states_tells_what_the_cache_did(
    run_cli: Cli, ranker: Ranker, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Four users in turn, each with one event more every time, then once more without."""
    schema = ranker.bundle.manifest.schema
    users = [request_of(schema, events=100, candidates=3, seed=user) for user in range(4)]
    grown = [first_events(users[turn % 4], 10 + turn // 4, user=f"u{turn % 4}") for turn in range(100)]
    write_requests(tmp_path / "requests.json", grown)
    options = ("--input", tmp_path / "requests.json", "--requests", 100, "--state-memory", "8MB", "--threads", 1)
    result = run_cli("bench", tiny_bundle, *options, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    # 10 requests warm up; of the 100 that follow the last 10 begin the list anew, each user's first with a state that
    # is longer than its history.
    assert "answered by append 96, prefill 4" in found["notes"]
    assert "prefill ran 4 times, too rarely for percentiles" in found["notes"]
    assert set(found["summary"]) == {"encode", "append", "decode", "whole"}
    refused = run_cli("bench", tiny_bundle, "--state-memory", "8MB")
    assert refused.returncode == 2
    assert "random requests are not; give --input" in refused.stderr
