"""The kernels compiled ahead of time, by the command that makes the report: none spills, no size is a variant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from parity_tests.triton_device import needs_triton

pytestmark = [needs_triton, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[1]
MOST = 20  # variants of one model on one device: the number does not depend on the requests


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    hidden = ("TRITON_INTERPRET", "PYTHONSAFEPATH")  # kernels are to be compiled, and benchmarks found in the checkout
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | variables
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=900, check=False, cwd=ROOT, env=environment
    )


MODELS = ("onetrans-s", "onetrans-l")


def run_of_each_model(*command: Callable[[str], str] | str) -> list[subprocess.CompletedProcess[str]]:
    """Runs a command for every model, side by side: tracing and compiling use one core each."""
    with ThreadPoolExecutor() as pool:
        words = [[part if isinstance(part, str) else part(model) for part in command] for model in MODELS]
        return list(pool.map(lambda each: run(*each), words))


def test_every_kernel_compiles_for_every_architecture_and_has_no_fault(tmp_path: Path) -> None:
    done = run_of_each_model(
        *("-m", "benchmarks", "--suite", "compiled", "--json", "--only", lambda model: f"{model}/bf16"),
        *(
            "--artefacts",
            lambda model: str(tmp_path / model / "kernels"),
            "--output",
            lambda model: str(tmp_path / model),
        ),
    )
    for each in done:
        assert each.returncode == 0, each.stderr[-3000:]
    measures = {name: measure for each in done for name, measure in json.loads(each.stdout)["measures"].items()}
    assert set(measures) == {f"{m}/bf16/sm_{arch}" for m in MODELS for arch in (80, 90, 100)}
    assert all(row["value"] == 0 for m in measures.values() for row in m["rows"] if row["name"].endswith("faults"))
    assert not any(measure.get("failed") for measure in measures.values())
    assert all(len(measure["tuned_sha256"]) == 64 for measure in measures.values())
    variants = [figure for measure in measures.values() for figure in measure["figures"]]
    entries = {"mixed_linear", "mixed_ffn", "history_attention", "candidate_attention"}
    entries |= {"candidate_fold", "queried_rows"}
    for capability in (80, 90, 100):
        assert {row["entry"].removesuffix("_kernel") for row in variants if row["capability"] == capability} == entries
    for row in variants:
        assert row["spilled"] == 0
        assert row["scratch"] == 0
        assert 0 < row["registers"] <= 255
        if row["entry"] not in ("candidate_fold_kernel", "queried_rows_kernel"):
            wanted = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[row["capability"]]
            assert row["matrix"][wanted] > 0, row["name"]
    kept = sorted(path for model in MODELS for path in (tmp_path / model / "kernels" / "sm_90").iterdir())
    assert {path.suffix for path in kept} == {".ptx", ".cubin", ".json"}
    assert len(kept) == 3 * sum(row["capability"] == 90 for row in variants)
    for path in kept:
        if path.suffix == ".json":  # what an external launcher can pass: pointers and int32, nothing else
            arguments = json.loads(path.read_text(encoding="utf-8"))["arguments"]
            assert set(arguments.values()) <= {"*bf16", "*fp32", "*i64", "i32"}
            assert path.with_suffix(".cubin").read_bytes()[:4] == b"\x7fELF"
            assert ".entry" in path.with_suffix(".ptx").read_text(encoding="utf-8")


COUNT = """
import itertools, sys, torch
from benchmarks.cases.compiled import launched, lowered_model
from onetrans.kernels.launch.config import Device

name = sys.argv[1]
model, device = lowered_model(name, torch.bfloat16), Device(capability=90)
few = launched(model, device)
sizes = [*itertools.product((1, 2, 5), (1, 7, 100, 501), (1, 63, 64, 200)), (1, 2000, 90)]
many = launched(model, device, sizes)
print(name, len(few), len(many), {v.name for v in few} == {v.name for v in many})
"""


def test_the_number_of_variants_does_not_depend_on_the_requests() -> None:
    for model, done in zip(MODELS, run_of_each_model("-c", COUNT, str), strict=True):
        assert done.returncode == 0, done.stderr[-3000:]
        name, few, many, same = done.stdout.split()
        assert (name, int(many), same) == (model, int(few), "True")
        assert int(many) <= MOST, name


def test_interpreted_kernels_cannot_be_compiled() -> None:
    done = run("-m", "benchmarks", "--suite", "compiled", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: TRITON_INTERPRET is set")
