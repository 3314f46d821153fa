"""The CPU suite and the runner: the floor against the graphs that it is a floor of, turns, resuming, and the pages."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import report
from benchmarks.__main__ import main
from benchmarks.context import RESULTS, Context, measure_key
from benchmarks.reckoning import decode_products, prefill_products
from benchmarks.suites import suite_of
from onetrans.bench.floor import Floor, floor_model, time_products
from onetrans.bench.rates import Product, visible_pairs, work_of
from onetrans.bench.record import write_json
from onetrans.bench.run import in_turn
from onetrans.bench.runner import Measure, Options, Runner, Suite
from onetrans.bench.suite import Outcome, Row, format_row, new_suite, read_suite
from onetrans.bench.user import one_user
from onetrans.errors import DataError
from onetrans.model.config import ModelConfig
from onetrans.model.presets import preset
from onetrans.runtime.backends.base import BackendOptions
from onetrans.runtime.ranker import Ranker
from parity_tests.records import short_record


@pytest.fixture(scope="module")
def ranker(tiny_bundle: Path) -> Ranker:
    return Ranker.open(tiny_bundle, options=BackendOptions(threads=1))


@pytest.fixture(scope="module")
def record(ranker: Ranker) -> dict[str, Any]:
    return short_record(ranker)


SMALL = dataclasses.replace(preset("tiny"), l_ns=2, d=8, heads=2, layers=2, event_hidden=6, tokenizer_hidden=10)


def hand(lengths: tuple[int, int], candidates: int) -> tuple[int, int, int]:
    """Decode, prefill and visible-only prefill of SMALL, token by token: d 8, feed-forward 32, two heads of 4."""
    c, (first, second) = SMALL, lengths
    known = sum(f.embedded_dim for f in c.schema.candidate)
    wide, user = sum(f.embedded_dim for f in c.schema.event), sum(f.embedded_dim for f in c.schema.user)
    macs = candidates * (known * 10 + 10 * 2 * 8)
    for window in lengths:
        per_token = 8 * 24 + 8 * 8 + 2 * 8 * 32 + 2 * 8 * (window + 2)
        macs += candidates * 2 * per_token
    macs += candidates * 2 * (8 * c.head_hidden + c.head_hidden)
    prefill = user * 10 + first * (wide * 6 + 6 * 8) + (first + second) * 8 * 16
    prefill += second * (8 * 8 + 8 * 8 + 2 * 8 * 32)
    pairs = sum(first - second + i + 1 for i in range(second))
    return 2 * macs, 2 * (prefill + 2 * 8 * second * first), 2 * (prefill + 2 * 8 * pairs)


def flops(products: list[Product]) -> int:
    return work_of(products, "float32").flops


def test_floor_counts_equal_a_hand_count() -> None:
    lengths = (11, 7)
    decode, prefill, visible = hand(lengths, 3)
    assert flops(decode_products(SMALL, lengths, 3)) == decode
    assert flops(prefill_products(SMALL, lengths, visible_only=False)) == prefill
    assert flops(prefill_products(SMALL, lengths, visible_only=True)) == visible
    brute = sum(key <= 4 + query for query in range(7) for key in range(11))
    assert visible_pairs(7, 11) == brute


@pytest.mark.parametrize(("events", "candidates"), [(1, 1), (20, 7), (63, 5)])
def test_graphs_do_the_floors_operations_and_no_more(ranker: Ranker, events: int, candidates: int) -> None:
    user = one_user(ranker, events, candidates)
    config = ModelConfig.from_json(user.manifest.model)
    user.prefill(0, events)()
    lengths = user.pool.lengths(0).tolist()
    assert lengths == [events] * config.layers
    done = user.graph_flops("prefill", user.window(events))
    assert done == flops(prefill_products(config, lengths, visible_only=False))
    # Zero value rows stand in for the own block (candidate_attention's lowering): L_NS more columns of P·V per layer.
    zeros = 2 * config.layers * candidates * config.l_ns**2 * config.d
    needed = flops(decode_products(config, lengths, candidates))
    assert user.graph_flops("decode", user.window(events)) == needed + zeros


def test_an_append_of_ours_is_a_prefill(ranker: Ranker) -> None:
    user = one_user(ranker, 40, 3)
    user.prefill(0, 33)()
    append = user.append(0, 33, 40)
    append()
    append()  # can be run again and again
    user.prefill(1, 40)()
    np.testing.assert_allclose(user.scores(0), user.scores(1), rtol=0, atol=1e-6)


def test_floor_is_nothing_but_its_matmuls_and_runs() -> None:
    import onnx

    products = decode_products(SMALL, (11, 7), 3)
    model = onnx.load_model_from_string(floor_model(products))
    onnx.checker.check_model(model)
    assert {node.op_type for node in model.graph.node} == {"MatMul"}
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*inferred.input, *inferred.output)}
    shapes |= {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in inferred.value_info}
    counted = sum(2 * int(np.prod(shapes[n.output[0]])) * shapes[n.input[0]][-1] for n in model.graph.node)
    assert counted == flops(products)
    assert Floor(products, threads=1).run() > 0
    seconds = time_products(products, threads=1, rounds=5)
    assert len(seconds) == 5
    assert min(seconds) > 0
    alone = [Product(name="a", rows=2, inner=3, columns=4)]
    assert work_of(alone, "float32", activations=True).each == ((48, 4 * (6 + 12 + 8)),)
    assert work_of(alone, "bfloat16").each == ((48, 2 * 12),)


def a_suite(record: dict[str, Any]) -> dict[str, Any]:
    rows = [Row(name=begin, unit="", value=1.0) for _, begin, _ in report.FIGURES]
    rows[1] = Row(name="decode of 100", unit="", value=1.23, low=1.2, high=1.3, target=1.4, prediction=1.1)
    rows += [
        Row(name="speed-up", unit="", value=150.0, target=200.0, at_least=True),
        Row(name="error", unit="", value=2.5e-7, target=1e-5),
    ]
    suite = new_suite("cpu")
    for name in dict.fromkeys(measure for measure, _, _ in report.FIGURES):
        records = {"tiny": record} if name == "latency" else {}
        outcome = Outcome(rows=rows, records=records, tables={"A table": [["a", "b"], ["1", "2"]]})
        suite["measures"][name] = {"key": {"quick": False}, "environment": record["environment"], **outcome.plain()}
    return suite


def test_pages_are_written_from_the_record_and_checked(record: dict[str, Any], tmp_path: Path) -> None:
    readme, page, results = tmp_path / "README.md", tmp_path / "benchmarks.md", tmp_path / "results"
    arguments = ["--readme", str(readme), "--page", str(page), "--results", str(results)]
    write_json(results / "cpu.json", a_suite(record))
    readme.write_text("# Title\n\n<!-- figures:begin -->\n<!-- figures:end -->\n\nrest\n", encoding="utf-8")
    page.write_text("<!-- cpu:begin -->\n<!-- cpu:end -->\n", encoding="utf-8")

    def run(*more: str) -> tuple[int, str]:
        result = CliRunner().invoke(report.main, [*arguments, *more])
        return result.exit_code, result.output

    assert run("--check")[0] == 1
    assert run()[0] == 0
    text, figures = page.read_text(encoding="utf-8"), readme.read_text(encoding="utf-8")
    assert figures.startswith("# Title\n\n<!--")
    assert figures.endswith("-->\n\nrest\n")
    assert figures.count("\n|") == 2 + len(report.FIGURES)
    assert "| decode of 100 candidates over nothing but its MatMuls | 1.23 (1.2 – 1.3) | ≤ 1.4 |" in figures
    assert "| decode of 100 | ≤ 1.4 | 1.1 | 1.23 (1.2 – 1.3) | yes |" in text
    assert "| speed-up | ≥ 200 |  | 150 | **no** |" in text
    assert "| error | ≤ 1e-05 |  | 2.5e-07 | yes |" in text
    assert "9 events, 5 candidates" in text
    assert "A table:\n\n| a | b |\n| --- | ---: |\n| 1 | 2 |" in text
    assert (results / "cpu-latency-tiny.svg").is_file()
    assert run("--check") == (0, "")
    assert run()[0] == 0
    assert page.read_text(encoding="utf-8") == text
    page.write_text(text.replace("1.23", "1.03"), encoding="utf-8")
    assert run("--check")[0] == 1
    page.write_text("no marks", encoding="utf-8")
    assert run()[0] == 2
    quick = a_suite(record)
    quick["measures"]["latency"]["key"]["quick"] = True
    write_json(results / "cpu.json", quick)
    with pytest.raises(DataError, match="quick"):
        report.records(results)


def test_the_committed_pages_are_those_of_the_committed_records() -> None:
    result = CliRunner().invoke(report.main, ["--check"])
    assert (result.exit_code, result.output) == (0, "")
    kept = read_suite(RESULTS / "cpu.json")["measures"]
    assert list(kept) == list(suite_of("cpu").measures)
    assert all(measure["environment"]["date"] and measure["rows"] for measure in kept.values())
    (row,) = (
        row for row in kept["request_vs_unsplit"]["rows"] if row["name"].startswith("one eager PyTorch forward for")
    )
    assert row["target"] is None  # operations and bytes allow about 40: a figure with its prediction, and no target
    assert 35 <= row["prediction"] <= 45
    assert row["value"] > 1


def test_suite_resumes_by_source_and_configuration(tmp_path: Path) -> None:
    ran: list[str] = []

    def measure(context: Any, name: str) -> Outcome:
        ran.append(name)
        return Outcome(rows=[Row(name="x", unit="ms", value=1.0)], samples={"x": [0.5, 1.5]})

    names = ("first", "second")
    measures = {n: Measure(name=n, seconds=1.0, run=lambda context, n=n: measure(context, n)) for n in names}

    def run(**options: Any) -> int:
        suite, given = Suite(name="cpu", measures=measures), Options(output=tmp_path, log=True, **options)
        key_of = functools.partial(measure_key, suite, given)
        return Runner(suite, given, Context(work=tmp_path), key_of).run()

    assert run(only=("second",)) == 0
    assert run() == 0
    assert ran == ["second", "first"]
    found = json.loads((tmp_path / "cpu.json").read_text(encoding="utf-8"))["measures"]
    assert list(found) == ["first", "second"]
    assert found["first"]["samples"] == {"x": [0.5, 1.5]}
    assert {"date", "commit", "cpu", "libraries"} <= set(found["first"]["environment"])
    assert "x: 1 ms" in (tmp_path / "cpu.log").read_text(encoding="utf-8")
    run()
    assert len(ran) == 2
    run(fresh=True, only=("first",))
    run(threads=1, only=("first",))
    assert len(ran) == 4


def test_a_measures_key_holds_its_own_code_and_the_packages() -> None:
    suite, options = suite_of("cpu"), Options(output=RESULTS)
    keys = {name: measure_key(suite, options, suite.measures[name]) for name in ("append", "tiers", "parity")}
    assert keys["append"] == keys["tiers"]  # of one file
    assert keys["append"]["source_sha256"] != keys["parity"]["source_sha256"]
    assert {"quick", "threads", "device", "libraries"} < set(keys["parity"])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--quick",), "error: --quick needs --output FOLDER: its few samples do not belong into the kept record"),
        (("--only", "nonsense"), "error: no measure is called nonsense; --list names them"),
        (("--tune",), "error: --tune belongs to --suite gpu, not to cpu"),
        (("--threads", "0"), "Error: Invalid value for '--threads': 0 is not in the range x>=1."),
        (("--suite", "gpu", "--budget", "-1"), "Error: Invalid value for '--budget': -1.0 is not in the range x>=1."),
    ],
    ids=["quick", "only", "tune", "threads", "budget"],
)
def test_a_wrong_argument_is_refused_in_one_line(arguments: tuple[str, ...], line: str) -> None:
    result = CliRunner().invoke(main, list(arguments))
    assert (result.exit_code, result.output.splitlines()[-1]) == (2, line)


def test_in_turn_alternates() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    seconds = in_turn(runs, rounds=5, warmup=1, pause=0.0)
    assert order == ["a", "b"] * 6
    assert {name: len(values) for name, values in seconds.items()} == {"a": 5, "b": 5}


def test_a_missed_target_is_said() -> None:
    missed = Outcome(rows=[Row(name="decode", unit="ms", value=123.4, low=120.0, high=130.0, target=100.0)]).plain()
    assert format_row(missed["rows"][0]) == "decode: 123 ms (120 – 130), target ≤ 100 ms: MISSED"
    assert missed["notes"] == ["decode: target missed by 23%"]
