"""A serving host: a fresh environment with the `serve` extra alone, no torch and no onnx, gives the same scores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from onetrans.runtime import Ranker
from parity_tests.conftest import as_rows, request_of

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def run(*command: object, **options: str) -> subprocess.CompletedProcess[str]:
    """Without PYTHONPATH, so that only what is installed can be imported, and outside the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, check=False, env=environment, **options
    )


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment's bin folder."""
    folder = tmp_path_factory.mktemp("host")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    # A copy: building in the checkout would leave an egg-info folder there.
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "src"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source / name)], check=True)
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    constraints = ROOT / "constraints.txt"
    done = run(*pip, "--no-compile", "--constraint", constraints, f"{source}[serve]", cwd=str(folder))
    if done.returncode:
        probe = run(*pip, "--dry-run", "--no-deps", "click", cwd=str(folder))
        if probe.returncode:
            pytest.skip(f"pip reaches no package index: {' '.join(probe.stderr.split())[-200:]}")
    assert done.returncode == 0, done.stderr
    return python.parent


def test_torch_and_onnx_are_not_there(host: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.metadata import distributions; import json;"
        " print(json.dumps(sorted(d.metadata['Name'].lower() for d in distributions())))"
    )
    done = run(host / "python", "-c", code, cwd=str(tmp_path))
    installed = set(json.loads(done.stdout))
    assert {"onetrans-export", "onnxruntime", "numpy", "safetensors", "click", "rich"} <= installed
    assert not installed & {"torch", "onnx", "onnxscript", "triton", "sympy", "matplotlib"}
    where = run(host / "python", "-c", "import onetrans.runtime; print(onetrans.runtime.__file__)", cwd=str(tmp_path))
    assert where.stdout.startswith(str(host.parent)), where.stderr


def test_the_installed_script_scores_as_we_do(host: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    ranker = Ranker.open(tiny_bundle)
    schema = ranker.bundle.manifest.schema
    request = request_of(schema, events=150, candidates=20)
    given = {
        "history": as_rows(request.history),
        "profile": {name: np.asarray(value).tolist() for name, value in request.profile.items()},
        "candidates": as_rows(request.candidates),
    }
    (tmp_path / "request.json").write_text(json.dumps(given))
    done = run(host / "onetrans", "score", tiny_bundle, "--input", "request.json", "--json", cwd=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)["requests"][0]["logits"]
    expected = ranker.rank(history=request.history, profile=request.profile, candidates=request.candidates).logits
    assert found == {task: logits.tolist() for task, logits in expected.items()}


def test_verify_and_inspect_need_no_torch_either(host: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    done = run(host / "onetrans", "verify", tiny_bundle, "--json", cwd=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"] is True
    done = run(host / "onetrans", "inspect", tiny_bundle, "--svg", "split.svg", cwd=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "split.svg").is_file()


def test_what_needs_torch_says_so(host: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = (host / "onetrans-export", "--checkpoint", tiny_checkpoint, "--output", "out")
    done = run(*command, cwd=str(tmp_path))
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "torch" in last
    assert 'pip install "onetrans-export[cpu]"' in last
    assert list(tmp_path.iterdir()) == []
