"""The rules of the house: who imports whom, what is never called, how files look.

The rules are contracts of import-linter and settings of ruff, in `pyproject.toml`; here is what proves that they bite.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "onetrans"
MODULES = sorted(SOURCE.rglob("*.py"))
TESTS = sorted((ROOT / "parity_tests").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
LONGEST = 500
TREES = {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in MODULES}
BIN = Path(sys.executable).parent


def named(paths: Iterable[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "COLUMNS": "200"}
    command = [str(BIN / "lint-imports"), "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the package, its contracts beside it."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return tmp_path


def test_imports_follow_the_contracts() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


PLANTED = {
    "errors": ("import onetrans.files", "onetrans.errors -> onetrans.files"),
    "spec": ("from onetrans.features.schema import Feature", "onetrans.spec -> onetrans.features.schema"),
    "features/merge": (
        "def f():\n    from onetrans.model.stack import Stack",
        "onetrans.features.merge -> onetrans.model.stack",
    ),
    "features/windows": (
        "if TYPE_CHECKING:\n    import onetrans.kernels as k",
        "onetrans.features.windows -> onetrans.kernels",
    ),
    "kernels/activations": (
        "from onetrans.features import schema",
        "onetrans.kernels.activations -> onetrans.features.schema",
    ),
    "model/presets": (
        "class A:\n    def f(self):\n        import onetrans.runtime.ranker as r",
        "onetrans.model.presets -> onetrans.runtime.ranker",
    ),
    "runtime/metrics": ("from onetrans.parity import cases", "onetrans.runtime.metrics -> onetrans.parity.cases"),
    "parity/verify": ("from onetrans.kernels import jit", "onetrans.parity.verify -> onetrans.kernels.jit"),
    "export/probe": ("from onetrans.bench import stats", "onetrans.export.probe -> onetrans.bench.stats"),
    "bench/stats": ("def f():\n    from onetrans import model", "onetrans.bench.stats -> onetrans.model"),
    "bench/load": ("from onetrans.export import pipeline", "onetrans.bench.load -> onetrans.export.pipeline"),
    "sizing/plan": ("from onetrans.bench import stats", "onetrans.sizing.plan -> onetrans.bench.stats"),
    "sizing/arrivals": ("from onetrans.kernels import jit", "onetrans.sizing.arrivals -> onetrans.kernels.jit"),
    "runtime/ranker": ("def f():\n    import torch", "onetrans.runtime.ranker -> torch"),
    "features/columns": ("import pyarrow.parquet", "onetrans.features.columns -> pyarrow"),
    "bench/report": ("def f():\n    import matplotlib.pyplot", "onetrans.bench.report -> matplotlib"),
    "cli/doctor": ("def f():\n    import onnxruntime", "onetrans.cli.doctor -> onnxruntime"),
    "cli/score": ("from benchmarks import report", "onetrans.cli.score -> benchmarks"),
    "__init__": ("from onetrans import errors", "onetrans -> onetrans.errors"),
}


def test_every_wrong_arrow_is_found_in_a_function_too(house: Path) -> None:
    for module, (text, _) in PLANTED.items():
        with (house / "src" / "onetrans" / f"{module}.py").open("a", encoding="utf-8") as file:
            file.write(f"\n{text}\n")
    done = lint_imports(house)
    assert done.returncode == 1, done.stderr
    assert [arrow for _, arrow in PLANTED.values() if f"{arrow} (l." not in done.stdout] == [], done.stdout


def test_a_new_package_must_be_given_its_place(house: Path) -> None:
    (house / "src" / "onetrans" / "attic").mkdir()
    (house / "src" / "onetrans" / "attic" / "__init__.py").touch()
    done = lint_imports(house)
    assert done.returncode == 1
    assert "attic" in done.stdout


def test_modules_are_named_as_text_by_the_tables_alone() -> None:
    """`import_module("onetrans.…")`, which no arrow shows: targets, adapters, kernels, runtime, commands."""
    called = {
        path
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module")
    }
    assert {path.relative_to(SOURCE).as_posix() for path in called} == {
        "cli/main.py",
        "export/models/base.py",
        "kernels/define.py",
        "runtime/__init__.py",
        "runtime/targets.py",
    }


REFUSED = {
    "import pickle": "TID251",
    "def f():\n    from torch.export import load\n": "TID251",
    "import torch as t\n\nx = t.load": "TID251",
    "x = eval('1')": "S307",
    "exec('1')": "S102",
    "import subprocess\n\nsubprocess.run('ls', shell=True)": "S602",
    "from .ranker import Ranker": "TID252",
}


@pytest.mark.parametrize("text", REFUSED, ids=REFUSED.values())
def test_ruff_refuses_what_runs_a_files_contents(text: str) -> None:
    where = "src/onetrans/runtime/planted.py"
    command = [str(BIN / "ruff"), "check", "--output-format", "concise", "--stdin-filename", where, "-"]
    done = subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, timeout=60, check=False)
    assert f" {REFUSED[text]} " in done.stdout


def test_what_ruff_has_no_rule_for() -> None:
    """No name of a builtin that runs text, called or handed on, and no argument that lifts a safeguard."""
    lifted = {("allow_pickle", True), ("weights_only", False), ("shell", True)}
    wrong = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in {"eval", "exec", "compile", "__import__"}:
                wrong.append(f"{path}:{node.lineno}: {node.id}")
            elif isinstance(node, ast.keyword) and (node.arg, getattr(node.value, "value", None)) in lifted:
                wrong.append(f"{path}:{node.value.lineno}: {node.arg}")
    assert wrong == []


@pytest.mark.parametrize("name", ["export", "kernels", "runtime"])
def test_top_level_links(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert os.readlink(link) == f"src/onetrans/{name}"
    assert link.resolve() == (SOURCE / name).resolve()
    assert (link / "__init__.py").is_file()


HEAVY = ("torch", "onnx", "onnxscript", "onnxruntime", "pyarrow", "matplotlib", "prometheus_client")


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("onetrans.runtime", ()),
        ("onetrans.parity.verify", ()),
        ("onetrans.bench.run", ()),
        ("onetrans.sizing.plan", ()),
        ("onetrans.export.config", ()),
        ("onetrans.features.logs", ()),
        ("onetrans.cli.main", ()),
        ("onetrans.cli.score", ("onnxruntime",)),
        ("onetrans.cli.verify", ("onnxruntime",)),
        ("onetrans.cli.inspect", ()),
        ("onetrans.cli.export", ()),
        ("onetrans.cli.bench", ()),
        ("onetrans.cli.doctor", ()),
    ],
)
def test_light_imports_stay_light(module: str, allowed: tuple[str, ...]) -> None:
    absent = set(HEAVY) - set(allowed)
    absent |= {"numpy"} if module == "onetrans.cli.doctor" else set()
    code = f"import sys, {module}; print(sorted(set(sys.modules) & {absent!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_packages_say_what_they_are() -> None:
    packages = {path: ast.get_docstring(tree) or "" for path, tree in TREES.items() if path.name == "__init__.py"}
    assert named(path for path, docstring in packages.items() if len(docstring) <= 20) == []
    assert {path.parent for path in MODULES} == {path.parent for path in packages}


def test_files_are_short() -> None:
    paths = [*MODULES, *TESTS, *BENCHMARKS]
    assert len(MODULES) > 60
    assert named(path for path in paths if len(path.read_text(encoding="utf-8").splitlines()) > LONGEST) == []


def test_descriptions_name_the_thing() -> None:
    """No docstring, nor what it says of an argument or attribute, begins with "Of": alone it would say nothing."""
    pattern = re.compile(r'^\s+\w+: Of |"""Of ')
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in ("src", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert found == []
