"""The golden cases, through the command that anybody can run on a case of their own."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from parity_tests.golden import main

ROOT = Path(__file__).resolve().parents[1]
CASES = ROOT / "parity_tests" / "golden_cases"
SHA256 = {
    "anchor_crossing.npz": "5cbf8359889d2e5ff3ada7bd75f1a6fe0152096e3b0b3a1ff5ee8734381436c1",
    "anchored_append.npz": "67c5299d4a941593703db15ff6ec176d8633a7da864ad5c275581fc02b1f5ab7",
    "empty_history.npz": "d48042b089100d7ffd0bd00e394e6ef0a3e506c32bfd91d91040237b56b10ad5",
    "history_longer_than_max.npz": "dec03ef662678f6d09b9236986f7740590e3aed610e7c1616257e2c1658c73e8",
    "odd_sizes.npz": "07d657f9e259e6023dc9603f9cd292ba08b30b17e9eb2129642e36a79cee0bd5",
    "tail_windows.npz": "2bc273315605b95c31622ee055a5c08c966e6ce416c85faf959e043751162358",
}


Golden = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def golden(capfd: pytest.CaptureFixture[str]) -> Golden:
    """The command in this process, which has imported torch already."""

    def call(*files: Path) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        status = main([str(file) for file in files])
        return subprocess.CompletedProcess(files, status, *capfd.readouterr())

    return call


def perturbed(tmp_path: Path, name: str, array: str, relative: float) -> Path:
    with np.load(CASES / name) as loaded:
        case = {key: loaded[key] for key in loaded.files}
    case[array] = case[array] * (1 + relative)
    np.savez(tmp_path / name, **case)
    return tmp_path / name


@pytest.mark.parametrize("name", SHA256)
def test_the_cases_are_unchanged(name: str) -> None:
    assert hashlib.sha256((CASES / name).read_bytes()).hexdigest() == SHA256[name]


def test_every_case_is_listed_here() -> None:
    assert sorted(path.name for path in CASES.glob("*.npz")) == sorted(SHA256)


def test_the_reference_meets_every_case() -> None:
    command = [sys.executable, "-m", "parity_tests.golden", *(str(CASES / name) for name in SHA256)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(SHA256)
    for line in lines:
        count, error = line.split(": ")[1].split(" arrays, largest relative error ")
        assert int(count) >= 1
        assert float(error.split(" at ")[0]) <= 1e-12  # two digits better than the bound of 1e-10


@pytest.mark.parametrize(
    ("name", "array"), [("odd_sizes.npz", "out"), ("anchored_append.npz", "k"), ("empty_history.npz", "out")]
)
def test_a_perturbed_expectation_is_found(golden: Golden, tmp_path: Path, name: str, array: str) -> None:
    with np.load(CASES / name) as loaded:
        chosen = next(key for key in loaded.files if key.split(".")[0] == array and loaded[key].size)
    done = golden(CASES / "tail_windows.npz", perturbed(tmp_path, name, chosen, 1e-8))
    assert (done.returncode, done.stderr) == (1, "")
    good, bad = done.stdout.splitlines()
    assert "beyond" not in good
    assert bad.startswith(f"{name}: ")
    assert bad.endswith(f"largest relative error 1.00e-08 at {chosen}, beyond 1e-10")


def test_a_perturbed_weight_is_found(golden: Golden, tmp_path: Path) -> None:
    done = golden(perturbed(tmp_path, "tail_windows.npz", "layer0.wv_s", 1e-7))
    assert done.returncode == 1
    assert "beyond 1e-10" in done.stdout


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "folder", "no-config", "no-arrays", "truncated"])
def test_what_is_no_case(golden: Golden, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "case.npz"
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("not a case")
    elif kind == "no-config":
        np.savez(path, weights=np.ones(3))
    elif kind == "no-arrays":
        with np.load(CASES / "odd_sizes.npz") as loaded:
            np.savez(path, config=loaded["config"], lengths=loaded["lengths"])
    elif kind == "truncated":
        path.write_bytes((CASES / "odd_sizes.npz").read_bytes()[:5000])
    done = golden(path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{path}: not a golden case: ")
    assert done.stderr.count("\n") == 1


def test_no_file_is_a_usage_mistake(golden: Golden, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        golden()
    assert caught.value.code == 2
    assert "usage: python -m parity_tests.golden" in capfd.readouterr().err
