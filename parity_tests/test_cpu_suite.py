"""The CPU suite: its floor against the graphs that it is a floor of, turns, resuming, and the README's table."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import cpu, report
from benchmarks.floor import Floor
from benchmarks.graph_flops import graph_flops
from benchmarks.measure import Measured, Row, in_turn
from benchmarks.products import Product, decode_products, prefill_products, total_flops, visible_pairs
from benchmarks.suite import format_row, new_suite
from benchmarks.torch_floor import time_products
from onetrans.bench.record import write_json
from onetrans.errors import DataError
from onetrans.model.config import ModelConfig
from onetrans.model.presets import preset
from onetrans.runtime.backends.base import BackendOptions
from onetrans.runtime.ranker import Ranker
from parity_tests.conftest import request_of
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


def test_floor_counts_equal_a_hand_count() -> None:
    lengths = (11, 7)
    decode, prefill, visible = hand(lengths, 3)
    assert total_flops(decode_products(SMALL, lengths=lengths, candidates=3)) == decode
    assert total_flops(prefill_products(SMALL, lengths=lengths, visible_only=False)) == prefill
    assert total_flops(prefill_products(SMALL, lengths=lengths, visible_only=True)) == visible
    brute = sum(key <= 4 + query for query in range(7) for key in range(11))
    assert visible_pairs(7, 11) == brute


@pytest.mark.parametrize(("events", "candidates"), [(1, 1), (20, 7), (63, 5)])
def test_graphs_do_the_floors_operations_and_no_more(ranker: Ranker, events: int, candidates: int) -> None:
    manifest = ranker.bundle.manifest
    config = ModelConfig.from_json(manifest.model)
    request = request_of(manifest.schema, events=events, candidates=candidates)
    parsed = [ranker.encoder.parse(request)]
    user, candidate = ranker.encoder.user_inputs(parsed), ranker.encoder.candidate_inputs(parsed)[0]
    pool = ranker.backend.allocate(1)
    ranker.backend.prefill(pool, [0], user)
    values = {**pool.read(0), **user, **candidate}
    lengths = values["lengths"][0].tolist()
    assert lengths == [events] * config.layers

    def done(graph: str) -> int:
        return graph_flops(ranker.bundle, graph, {s.name: values[s.name] for s in manifest.graphs[graph].inputs})

    assert done("prefill") == total_flops(prefill_products(config, lengths=lengths, visible_only=False))
    # Zero value rows stand in for the own block (candidate_attention's lowering): L_NS more columns of P·V per layer.
    zeros = 2 * config.layers * candidates * config.l_ns**2 * config.d
    needed = total_flops(decode_products(config, lengths=lengths, candidates=candidates))
    assert done("decode") == needed + zeros


def test_floor_is_nothing_but_its_matmuls_and_runs() -> None:
    import onnx

    from benchmarks.floor import floor_model

    products = decode_products(SMALL, lengths=(11, 7), candidates=3)
    model = onnx.load_model_from_string(floor_model(products))
    onnx.checker.check_model(model)
    assert {node.op_type for node in model.graph.node} == {"MatMul"}
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*inferred.input, *inferred.output)}
    shapes |= {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in inferred.value_info}
    counted = sum(2 * int(np.prod(shapes[n.output[0]])) * shapes[n.input[0]][-1] for n in model.graph.node)
    assert counted == total_flops(products)
    assert Floor(products, threads=1).run() > 0
    seconds = time_products(products, threads=1, rounds=5)
    assert len(seconds) == 5
    assert min(seconds) > 0
    chained = Product(name="a", batch=1, rows=2, inner=3, columns=4, weight=True)
    assert (chained.flops, chained.bytes) == (48, 4 * (6 + 12 + 8))


def test_in_turn_alternates() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    seconds = in_turn(runs, rounds=5, warmup=1, pause=0.0)
    assert order == ["a", "b"] * 6
    assert {name: len(values) for name, values in seconds.items()} == {"a": 5, "b": 5}


def a_suite(record: dict[str, Any]) -> dict[str, Any]:
    rows = [
        Row(what="decode over its MatMuls", unit="", value=1.23, low=1.2, high=1.3, target=1.4, prediction=1.1),
        Row(what="speed-up", unit="", value=150.0, target=200.0, at_least=True),
        Row(what="error", unit="", value=2.5e-7, target=1e-5),
    ]
    part = {"key": {"quick": False}, "environment": record["environment"], "notes": [], "samples": {}}
    suite = new_suite("cpu")
    suite["measures"]["decode_vs_matmul"] = {**part, "rows": [cpu.plain_row(row) for row in rows], "records": {}}
    suite["measures"]["latency"] = {**part, "rows": [], "records": {"tiny": record}}
    return suite


def test_readme_table_is_written_from_the_record_and_checked(record: dict[str, Any], tmp_path: Path) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    arguments = ["--readme", str(readme), "--results", str(results)]
    write_json(results / "cpu.json", a_suite(record))
    readme.write_text(f"# Title\n\n{report.BEGIN}\n{report.END}\n\nrest\n", encoding="utf-8")

    def run(*more: str) -> tuple[int, str]:
        result = CliRunner().invoke(report.main, [*arguments, *more])
        return result.exit_code, result.output

    assert run("--check")[0] == 1
    assert run()[0] == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\n<!--")
    assert text.endswith("-->\n\nrest\n")
    assert "| decode over its MatMuls | ≤ 1.4 | 1.1 | 1.23 (1.2 – 1.3) | yes |" in text
    assert "| speed-up | ≥ 200 |  | 150 | **no** |" in text
    assert "| error | ≤ 1e-05 |  | 2.5e-07 | yes |" in text
    assert "9 events, 5 candidates" in text
    assert (results / "cpu-latency-tiny.svg").is_file()
    assert run("--check") == (0, "")
    assert run()[0] == 0
    assert readme.read_text(encoding="utf-8") == text
    readme.write_text(text.replace("1.23", "1.03"), encoding="utf-8")
    assert run("--check")[0] == 1
    readme.write_text("no marks", encoding="utf-8")
    assert run()[0] == 2
    quick = copy.deepcopy(a_suite(record))
    quick["measures"]["latency"]["key"]["quick"] = True
    with pytest.raises(DataError, match="quick"):
        report.measures_markdown([quick])


def test_suite_resumes_by_commit_and_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def fake(context: Any) -> Measured:
        ran.append(context.source)
        return Measured(rows=[Row(what="x", unit="ms", value=1.0)], samples={"x": [0.5, 1.5]})

    monkeypatch.setattr(cpu, "MEASURES", {"first": fake, "second": fake})
    output = tmp_path / "cpu.json"

    def run(*arguments: str) -> None:
        command = click.Command("cpu", callback=cpu.main.callback, params=cpu.main.params)
        for parameter in command.params:
            if parameter.name == "only":
                parameter.type = click.STRING
        result = CliRunner().invoke(command, ["--output", str(output), "--work", str(tmp_path), *arguments])
        assert result.exit_code == 0, result.output

    run("--only", "second")
    run()
    assert len(ran) == 2
    assert list(json.loads(output.read_text(encoding="utf-8"))["measures"]) == ["first", "second"]
    run()
    assert len(ran) == 2
    run("--fresh", "--only", "first")
    run("--threads", "1", "--only", "first")
    assert len(ran) == 4


def test_a_missed_target_is_said() -> None:
    row = cpu.plain_row(Row(what="decode", unit="ms", value=123.4, low=120.0, high=130.0, target=100.0))
    assert format_row(row) == "decode: 123 ms (120 – 130), target ≤ 100 ms: MISSED"
