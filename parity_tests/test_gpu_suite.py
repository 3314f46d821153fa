"""The GPU suite without a GPU: its code at tiny sizes, its reckoning, and how it resumes, stops and refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("triton")

from benchmarks import report, tuning
from benchmarks.__main__ import main
from benchmarks.cases import device
from benchmarks.context import RESULTS, ROOT, Context, real_sizes, rehearsal_sizes
from benchmarks.reckoning import append_products, decode_products, prefill_products, windows
from benchmarks.suites import suite_of
from onetrans.bench import runner as runners
from onetrans.bench.competition import compare, compare_programs
from onetrans.bench.processes import run_within
from onetrans.bench.rates import Rates, Work, candidate_work, ffn_work, history_work, linear_work, work_of
from onetrans.bench.runner import LostContextError, Measure, Options, Runner, chosen
from onetrans.bench.suite import Outcome, Row, new_suite, read_suite
from onetrans.bench.tests import read_report
from onetrans.errors import JobError, ParityError
from onetrans.kernels.launch import Device, LaunchConfig, choose
from onetrans.kernels.launch import table as launch_table

RATES = {"copy": 4e12, "matmul": {"bfloat16": 8e14, "float16": 8e14}, "launch": 1e-6}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
@pytest.mark.parametrize("arguments", [(), ("--tune",), ("--only", "ceilings")])
def test_without_a_gpu_one_line_says_what_is_missing(arguments):
    done = CliRunner().invoke(main, ["--suite", "gpu", *arguments])
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the GPU suite needs a CUDA device, and torch ")
    assert line.endswith("or try the suite's code with --rehearse")


@pytest.mark.slow
def test_a_rehearsal_runs_the_suites_code_and_keeps_nothing():
    """In a process of its own, as on a GPU host: with the source on the path, nothing installed, nothing fused."""
    before = {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    named = [
        "append/onetrans-s/bfloat16",
        "prefill_compiled/onetrans-s/bfloat16",
        "mixed_ffn/onetrans-l/float16",
        "history_attention/onetrans-l/float16",
        "candidate_attention/onetrans-s/bfloat16",
        "candidate_flex/onetrans-s/float16",
    ]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": ""}
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--suite", "gpu", "--rehearse", *(f"--only={name}" for name in named)],
        cwd=ROOT,
        env={**os.environ, **hidden, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in ("ceilings", *named):
        assert f" {name}:" in done.stderr
    assert "skipped, since they need a GPU: sdpa-flash, sdpa-cudnn, sdpa-efficient" in done.stderr
    assert "cannot run" not in done.stderr
    assert "is not the reference's" not in done.stderr
    for name in ("kernels", "eager", "sdpa-math", "expand + sdpa-math", "flex", "torch.compile reduce-overhead"):
        assert f"{name} " in done.stderr
    assert {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()} == before


def test_what_is_asked_for_by_name():
    known = suite_of("gpu").measures
    assert [m.name for m in chosen(("decode/onetrans-l",), known)] == [
        "decode/onetrans-l/bfloat16",
        "decode/onetrans-l/float16",
    ]
    assert {m.name for m in chosen(("*/bfloat16",), known)} < set(known)
    assert len(chosen((), known)) == len(known) == 74
    assert list(known)[:3] == ["tests", "ceilings", "decode/onetrans-l/bfloat16"]


# --- reckoning, by hand


def test_operations_and_bytes_of_kernels():
    # the last 2 of 3 tokens see 2 and 3; two products of 2 operations, 4 heads of 8; q, out, k and v in 2 bytes
    assert history_work(queries=2, window=3, heads=4, width=8) == Work(flops=4 * 32 * 5, bytes=2 * 32 * (4 + 6))
    # 2 positions over a window of 3: 3 + 1 and 3 + 2 pairs, of each of 5 candidates
    found = candidate_work(candidates=5, positions=2, window=3, heads=1, width=16)
    assert found == Work(flops=4 * 16 * 5 * 9, bytes=2 * 16 * (4 * 10 + 6))
    found = linear_work(positions=2, rows=3, inner=4, columns=5, gain=True, residual=True)
    assert (found.flops, found.bytes) == (2 * 2 * 3 * 4 * 5, 2 * (2 * 3 * 4 + 2 * (2 * 3 * 5) + 2 * 4 * 5 + 4))
    found = ffn_work(positions=1, rows=3, inner=4, hidden=16)
    assert (found.flops, found.weight_bytes) == (2 * 2 * 3 * 4 * 16, 2 * (2 * 4 * 16 + 4))


def test_floors_and_predictions():
    limits = Rates(copy=1e3, matmul={"bfloat16": 1e6}, launch=1.0)
    work = Work(flops=3_000_000, bytes=2000, weight_bytes=500)
    assert limits.floor(work, "bfloat16") == 3.0
    assert limits.weight_floor(Work(flops=1, bytes=9000, weight_bytes=500), "bfloat16") == 0.5
    assert limits.predict(work, "bfloat16") == pytest.approx(6.0 + 2e-6)
    assert limits.predict(work + work, "bfloat16", 5) == pytest.approx(12.0 + 1e-5)


def test_programs_reckoned_as_the_issue_has_them():
    """Decode of OneTrans-L reads 0.5 GB of weights; prefill of S does 8 GFLOP or so, an append of 8 a hundredth."""
    small, large = (real_sizes(name).config for name in ("onetrans-s", "onetrans-l"))
    decode = work_of(decode_products(large, windows(large, 1190), 100), "bfloat16")
    assert 0.48e9 < decode.weight_bytes < 0.53e9
    assert 0.06e12 < decode.flops < 0.08e12
    prefill = work_of(prefill_products(small, windows(small, 1190), visible_only=True), "bfloat16")
    append = work_of(append_products(small, 1100, 8), "bfloat16")
    assert 8e9 < prefill.flops < 9e9
    assert 0.008 < append.flops / prefill.flops < 0.015
    assert append.weight_bytes == prefill.weight_bytes
    assert windows(small, 1190) == [1190, 1190, 998, 742, 518, 294]


def test_the_rehearsal_appends_exactly_and_shrinks_its_windows():
    sizes = rehearsal_sizes("onetrans-s")
    assert windows(sizes.config, sizes.prefill)[1] < sizes.prefill
    chunk = sizes.config.append_chunk
    assert sizes.before // chunk == (sizes.before + sizes.new) // chunk


# --- parity


def test_what_is_not_written_never_passes():
    gold = torch.randn(4, 4, dtype=torch.float64)
    plain = gold.to(torch.bfloat16)
    assert compare(plain, plain, gold).passed
    broken = plain.clone()
    broken[0, 0] = float("nan")
    assert not compare(broken, plain, gold).passed
    assert not compare(plain + 0.1, plain, gold).passed
    lengths = torch.tensor([3])
    values = {"k0": plain, "lengths": lengths}
    wanted = {"k0": gold, "lengths": lengths}
    assert compare_programs(values, values, wanted, torch.bfloat16).passed
    assert not compare_programs({**values, "k0": broken}, values, wanted, torch.bfloat16).passed
    with pytest.raises(ParityError, match="output lengths differs"):
        compare_programs({**values, "lengths": lengths + 1}, values, wanted, torch.bfloat16)


# --- the runner


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """A suite of pretended measures: run(names of measures with what they take or raise, …) gives what was measured."""
    clock = Clock()
    tests = Outcome()

    def stage(plan, **options):
        done = []

        def measure(name, takes):
            def go(context):
                done.append(name)
                if isinstance(takes, BaseException):
                    raise takes
                clock.now += takes
                facts = {"rates": RATES} if name == "ceilings" else {}
                return Outcome(rows=[Row(name=name, unit="ms", value=2.0, target=1.0)], facts=facts)

            parts = name.split("/")
            concerns = {"name": name, "seconds": takes if isinstance(takes, float) else 1.0, "run": go}
            if len(parts) == 3:
                concerns |= {"concerns": tuple(parts[1].split("+")), "dtype": parts[2]}
            return Measure(**concerns, alone=name.startswith("alone"))

        made = {name: measure(name, takes) for name, takes in {"ceilings": 1.0, **plan}.items()}
        asked = Measure(name="tests", seconds=1.0, run=lambda context: dataclasses.replace(tests))
        suite = dataclasses.replace(suite_of("gpu"), measures={"tests": asked, **made})
        given = Options(output=tmp_path, **options)
        context = Context(work=tmp_path)
        stage.status = Runner(suite, given, context, lambda _: {"source_sha256": stage.source}, clock).run()
        return done

    stage.clock, stage.tests, stage.output, stage.source = clock, tests, tmp_path / "gpu.json", "a"
    return stage


def test_what_is_held_is_not_measured_again(stage):
    plan = {"one": 1.0, "two": 1.0}
    assert stage(plan) == ["ceilings", "one", "two"]
    assert stage(plan) == []
    assert stage(plan, only=("one",), fresh=True) == ["ceilings", "one"]
    stage.source = "another"
    assert stage(plan, only=("two",)) == ["ceilings", "two"]
    record = read_suite(stage.output)
    assert list(record["measures"]) == ["tests", "ceilings", "one", "two"]
    assert record["measures"]["two"]["rows"][0]["met"] is False
    assert record["measures"]["two"]["notes"] == ["two: target missed by 100%"]


def test_no_measure_starts_when_time_is_up(stage):
    plan = {"long": 60.0, "longer": 90.0, "short": 5.0, "last": 40.0}
    assert stage(plan, budget=100.0) == ["ceilings", "long", "short"]
    assert stage(plan, budget=100.0) == ["longer"]
    assert stage(plan, budget=100.0) == ["last"]
    assert stage.status == 0


def test_a_measure_that_takes_longer_than_the_budget_is_begun_in_a_run_of_its_own(stage):
    assert stage({"huge": 1000.0}, budget=10.0) == ["ceilings"]
    assert stage({"huge": 1000.0}, budget=10.0) == ["huge"]


def test_what_failed_is_recorded_and_tried_again_last(stage, capfd):
    assert stage({"bad": ValueError("no such kernel"), "good": 1.0}) == ["ceilings", "bad", "good"]
    assert stage.status == 1
    assert "failed: bad: ValueError: no such kernel" in capfd.readouterr().err
    held = read_suite(stage.output)["measures"]["bad"]
    assert (held["failed"], held["rows"]) == ("ValueError: no such kernel", [])
    assert stage({"bad": 1.0, "good": 1.0, "new": 1.0}) == ["new", "bad"]
    assert stage.status == 0


def test_a_measure_in_which_a_run_was_ended_comes_last_in_the_next(stage):
    plan = {"one": 1.0, "hangs": KeyboardInterrupt(), "two": 1.0}
    with pytest.raises(KeyboardInterrupt):
        stage(plan)
    assert list(read_suite(stage.output)["measures"]) == ["tests", "ceilings", "one"]
    with pytest.raises(KeyboardInterrupt):
        stage(plan)
    record = read_suite(stage.output)
    assert list(record["measures"]) == ["tests", "ceilings", "one", "hangs", "two"]
    assert record["measures"]["hangs"]["failed"] == "the run was ended while it ran"
    assert stage({**plan, "hangs": 1.0, "three": 1.0}) == ["three", "hangs"]
    assert "begun" not in read_suite(stage.output)


OPS = {"mixed_ffn/mixed_ffn/float16": 1.0, "mixed_linear/mixed_linear/float16": 1.0, "other": 1.0}
OPS |= {"mixed_ffn/mixed_ffn/bfloat16": 1.0, "decode/mixed_ffn+mixed_linear+programs/float16": 1.0}


def test_a_failing_test_leaves_what_it_concerns_without_figures_and_the_rest_is_timed(stage, capfd):
    stage.tests.failed = "pytest exited with 1"
    stage.tests.facts["concerns"] = [("mixed_ffn", "float16", "test_triton_linear::test_mixed_ffn[torch.float16]")]
    timed = ["ceilings", "mixed_linear/mixed_linear/float16", "other", "mixed_ffn/mixed_ffn/bfloat16"]
    assert stage(OPS) == timed
    assert stage.status == 1
    found = read_suite(stage.output)["measures"]
    assert set(found) == {"tests", "ceilings", *OPS}
    for name in ("mixed_ffn/mixed_ffn/float16", "decode/mixed_ffn+mixed_linear+programs/float16"):
        assert found[name]["rows"] == found[name]["figures"] == []
        assert found[name]["failed"].startswith(
            "not timed, since a GPU test failed: test_triton_linear::test_mixed_ffn"
        )
        assert f"failed: {name}: not timed" in capfd.readouterr().err or name.startswith("decode")
    for name in timed:
        assert found[name]["rows"][0]["value"] == 2.0
    assert stage(OPS) == []  # the tests told what failed: they and the rest stand
    stage.source, stage.tests.failed = "mended", ""
    stage.tests.facts.clear()
    assert stage(OPS) == [*timed, "mixed_ffn/mixed_ffn/float16", "decode/mixed_ffn+mixed_linear+programs/float16"]
    assert stage.status == 0


def test_no_kernel_is_timed_where_the_tests_did_not_end(stage):
    stage.tests.failed = "the tests did not end within 450 s"
    stage.tests.facts["concerns"] = [("", "", "the tests")]
    assert stage(OPS) == ["ceilings", "other"]
    stage.tests.failed = ""
    stage.tests.facts.clear()
    assert stage(OPS) == [name for name in OPS if name != "other"]  # the tests ran again


@pytest.mark.parametrize(
    ("test", "part", "dtype"),
    [
        ("parity_tests.test_triton_linear::test_mixed_ffn_fused[1-torch.float16]", "mixed_ffn", "float16"),
        ("parity_tests.test_triton_linear::test_positions_that_lie_oddly", "mixed_linear mixed_ffn", ""),
        ("parity_tests.test_triton_attention::test_tiles", "history_attention candidate_attention", ""),
        ("parity_tests.test_triton_gpu::test_an_op[torch.bfloat16-mixed_linear]", "mixed_linear", "bfloat16"),
        ("parity_tests.test_triton_target::test_scores[lowered0]", "programs", ""),
        ("parity_tests.test_triton_new::test_something", "", ""),
    ],
)
def test_what_a_failing_test_concerns(test, part, dtype):
    assert device.concern(test) == (part, dtype, test)
    assert set(part.split()) <= {name for m in suite_of("gpu").measures.values() for name in m.concerns}


def test_a_lost_device_ends_the_run_and_what_was_measured_stays(stage):
    plan = {"one": 1.0, "crash": LostContextError("the device's context is lost"), "two": 1.0}
    with pytest.raises(JobError, match="context is lost"):
        stage(plan)
    assert list(read_suite(stage.output)["measures"]) == ["tests", "ceilings", "one", "crash"]
    assert stage({**plan, "crash": 1.0}) == ["two", "crash"]


def test_a_measure_in_a_process_of_its_own_is_kept_or_named_as_ended(stage, monkeypatch):
    calls = []

    def pretend(command, seconds, printed, folder):
        calls.append((command, seconds))
        printed.write_text("said")
        if len(calls) == 1:
            return None
        goal = Path(command[command.index("--alone") + 1])
        goal.write_text(json.dumps({"key": {"source_sha256": "a"}, "rows": []}))
        return 0

    monkeypatch.setattr(runners, "run_within", pretend)
    assert stage({"alone": 50.0}, budget=100.0) == ["ceilings"]
    held = read_suite(stage.output)["measures"]["alone"]
    assert held["failed"] == "ended after 119 s"
    assert stage({"alone": 50.0}, budget=100.0) == []
    assert read_suite(stage.output)["measures"]["alone"] == {"key": {"source_sha256": "a"}, "rows": []}
    assert [command[1:7] for command, _ in calls] == [["-m", "benchmarks", "--suite", "gpu", "--only", "alone"]] * 2


def test_a_process_is_ended_in_time(tmp_path):
    code = "import time; print('begun', flush=True); time.sleep(60)"
    assert run_within([sys.executable, "-c", code], 2.0, tmp_path / "printed", tmp_path) is None
    assert (tmp_path / "printed").read_text() == "begun\n"
    assert run_within([sys.executable, "-c", "raise SystemExit(3)"], 20.0, tmp_path / "printed", tmp_path) == 3


def test_the_tests_report_is_counted(tmp_path):
    report = tmp_path / "report.xml"
    cases = (
        '<testcase classname="a" name="one"/>'
        '<testcase classname="a" name="two"><failure message="1 ==\n 2"/></testcase>'
        '<testcase classname="a" name="three"><skipped/></testcase>'
        '<testcase classname="a" name="four"><error/></testcase>'
    )
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    counts, failures = read_report(report)
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    assert failures == [("a::two", "1 == 2"), ("a::four", "")]
    assert read_report(tmp_path / "absent.xml")[0]["passed"] == 0


def test_the_table_of_the_pages():
    record = new_suite("gpu")
    seconds = {"value": 2e-4, "low": 1.9e-4, "high": 2.1e-4}
    figures = [
        {"case": "prefill of 3 events, s, float16", "contestant": name, "seconds": seconds, "floor": 1e-5}
        for name in ("kernels", "eager")
    ]
    rows = [Row(name="prefill", unit="ms", value=0.2, target=0.3, prediction=0.1), Row(name="x", unit="ms", value=0.2)]
    versions, gpu = {"torch": "2.11", "triton": "3.6"}, {"name": "A GPU", "cuda": "13.0"}
    where = {"commit": None, "dirty": None, "date": "2026-11-22T00:00:00", "gpu": gpu, "libraries": versions}
    entry = Outcome(rows=rows, figures=figures).plain()
    record["measures"]["prefill"] = {"key": {"quick": False}, "environment": where, **entry}
    text = "\n".join(report.gpu_lines(record))
    assert "| prefill | ≤ 0.3 ms | 0.1 ms | 0.2 ms | yes |" in text
    assert "| prefill of 3 events, s, float16 | 0.200 | 0.200 | 0.010 |" in text
    assert "| x |" not in text
    assert text.endswith(
        "All measured on one A GPU, torch 2.11, CUDA 13.0, Triton 3.6; no checkout; 2026-11-22. Intervals are of 95%."
    )


# --- tuning


def test_a_forced_configuration_is_chosen_while_it_is_forced():
    device, what = (
        Device(capability=90, name="none"),
        launch_table.problem("history_attention", "float16", 8, E=64, H=4),
    )
    usual = LaunchConfig(block_m=64, block_n=64)
    other = LaunchConfig(block_m=128, block_n=32, warps=8)
    assert choose(what, device, lambda *_: usual) == usual

    def default(*_):
        return usual

    assert choose(what, device, default) == usual
    with launch_table.forced("history_attention", other):
        assert choose(what, device, default) == other
    assert choose(what, device, default) == usual


def test_every_problem_of_the_programs_is_tuned_once():
    found = tuning.tasks(real_sizes)
    names = [task.name for task in found]
    assert len(set(names)) == len(names)
    assert {task.problem.op for task in found} == set(tuning.OPS)
    assert {task.problem.dtype for task in found} == {"bfloat16", "float16"}
    assert all(task.cases for task in found)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Pretends that tensors lie on a GPU called so, for the choice of configurations."""
    monkeypatch.setattr(tuning, "device_of", lambda where: Device(capability=90, name="A GPU"))


def test_a_winner_goes_into_the_table_of_the_output_and_a_loser_out_of_it(on_a_gpu, tmp_path):
    committed = launch_table.TABLE.read_bytes()
    options = Options(output=tmp_path / "run", log=True)
    best = {"block_m": 64, "block_n": 32}
    with tuning.use_table(options, write=True) as path:
        assert path == tmp_path / "run" / "tuned.json"
        facts = suite_of("gpu").facts
        before = facts()
        made = tuning.Tuner(options)
        task = tuning.tasks(real_sizes)[0]
        made.keep(task, {"won": True, "best": best})
        ops = {task.problem.op: {task.problem.dtype: {task.problem.key: best}}}
        assert json.loads(path.read_text())["A GPU"] == {"capability": 90, "ops": ops}
        key = ("A GPU", task.problem.op, task.problem.dtype, task.problem.key)
        assert launch_table.tuned()[key] == LaunchConfig(**best)
        assert facts() != before
        made.keep(task, {"won": False, "best": best})
        assert key not in launch_table.tuned()
        made.keep(task, {"won": True, "best": best})
    assert key not in launch_table.tuned()  # the committed table is in force again, and as it was
    assert launch_table.TABLE.read_bytes() == committed
    held = read_suite(tmp_path / "run" / "gpu-tuning.json")["measures"]
    assert list(held) == [task.name]
    with tuning.use_table(options, write=False):  # a later run with this output measures with its table
        assert launch_table.tuned()[key] == LaunchConfig(**best)


def test_tuning_rehearsed_keeps_nothing(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(tuning, "REHEARSED", 1)
    options = Options(output=tmp_path, rehearse=True, only=("mixed_linear",))
    assert tuning.Tuner(options).run() == 0
    assert "1.000 times faster than the default, kept as it is" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_tuning_voids_no_held_measure_and_each_notes_its_table(stage, on_a_gpu, capfd):
    plan = {"one": 1.0, "two": 1.0}
    assert stage(plan, only=("one",)) == ["ceilings", "one"]
    options = Options(output=stage.output.parent, log=True)
    with tuning.use_table(options, write=True):
        tuning.Tuner(options).keep(tuning.tasks(real_sizes)[0], {"won": True, "best": {"block_m": 64, "block_n": 32}})
        assert stage(plan) == ["two"]
    assert "3 of them have another tuned_sha256, which their entries note" in capfd.readouterr().err
    found = read_suite(stage.output)["measures"]
    assert found["one"]["tuned_sha256"] != found["two"]["tuned_sha256"]
