"""The rules of the house that no single module can keep: who imports whom, what is never called, how files look."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "onetrans"
MODULES = sorted(SOURCE.rglob("*.py"))
TESTS = sorted((ROOT / "parity_tests").rglob("*.py"))
LONGEST = 500

MAY_IMPORT = {
    "features": set(),
    "kernels": set(),
    "model": {"features", "kernels"},
    "runtime": {"features", "kernels"},
    "export": {"features", "kernels", "model", "runtime", "parity"},
    "parity": {"features", "runtime"},
    "bench": {"features", "runtime", "parity"},
    "sizing": {"features", "runtime", "parity", "bench"},
    "cli": {"features", "kernels", "model", "runtime", "export", "bench", "parity", "sizing"},
}
NEVER_IMPORTED = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NEVER_CALLED = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "torch.save",
    "torch.export.load",
    "torch.jit.load",
    "torch.package",
    "os.system",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(tree: ast.Module) -> Iterator[tuple[str, int, int]]:
    """(dotted name, relative level, line) of every import, within functions too; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module or ''}.{alias.name}", node.level, node.lineno) for alias in node.names)


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def package_of(path: Path) -> str:
    """The package under onetrans, or nothing for a module at its root."""
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else ""


def arrows(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(package of ours, line) of every import of one, root modules left out."""
    for name, _, line in imported(tree):
        parts = name.split(".")
        if parts[0] == "onetrans" and len(parts) > 1 and (SOURCE / parts[1]).is_dir():
            yield parts[1], line


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 60
    assert {package_of(path) for path in MODULES} == {"", *MAY_IMPORT}
    assert sum(1 for path in MODULES for _ in arrows(tree_of(path))) > 200


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_follow_the_arrows(path: Path) -> None:
    package = package_of(path)
    allowed = MAY_IMPORT[package] | {package} if package else set()
    wrong = [f"line {line}: onetrans.{target}" for target, line in arrows(tree_of(path)) if target not in allowed]
    assert wrong == [], f"{package or 'a root module'} may import {sorted(allowed)} alone"


def test_a_package_that_is_named_as_text_counts_too() -> None:
    """`import_module("onetrans.…")`, which the command line's group alone uses."""
    for path in MODULES:
        calls = [dotted(n.func) for n in ast.walk(tree_of(path)) if isinstance(n, ast.Call)]
        if package_of(path) != "cli":
            assert not [call for call in calls if call.endswith("import_module")], name_of(path)


def test_the_arrows_are_told_apart() -> None:
    """That the check itself finds a wrong arrow, in each of its forms."""
    for text in (
        "import onetrans.model.stack",
        "from onetrans.model import stack",
        "from onetrans import model",
        "def f():\n    from onetrans.model.stack import Stack",
        "if True:\n    import onetrans.model as m",
    ):
        assert [target for target, _ in arrows(ast.parse(text))] == ["model"], text
    assert list(arrows(ast.parse("from onetrans.errors import DataError\nfrom onetrans import __version__"))) == []


@pytest.mark.parametrize("name", ["export", "kernels", "runtime"])
def test_top_level_links(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert os.readlink(link) == f"src/onetrans/{name}"
    assert link.resolve() == (SOURCE / name).resolve()
    assert (link / "__init__.py").is_file()


@pytest.mark.parametrize("path", [*MODULES, *TESTS], ids=name_of)
def test_imports_are_absolute(path: Path) -> None:
    assert [line for _, level, line in imported(tree_of(path)) if level] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_runs_what_a_file_says(path: Path) -> None:
    tree = tree_of(path)
    assert [line for name, _, line in imported(tree) if name.split(".")[0] in NEVER_IMPORTED] == []
    known = {"torch": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    used = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            head, _, rest = dotted(node).partition(".")
            full = ".".join(filter(None, [known.get(head, head), rest]))
            used += [f"line {node.lineno}: {full}"] if full in NEVER_CALLED else []
    assert used == []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                assert (keyword.arg, value) not in {("allow_pickle", True), ("weights_only", False), ("shell", True)}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("onetrans.runtime", ("torch", "onnx", "onnxscript", "onnxruntime", "pyarrow", "matplotlib")),
        ("onetrans.cli.main", ("torch", "onnx", "onnxscript", "onnxruntime", "pyarrow", "matplotlib")),
        ("onetrans.cli.score", ("torch", "onnx", "onnxscript", "pyarrow")),
        ("onetrans.cli.verify", ("torch", "onnx", "onnxscript")),
        ("onetrans.cli.inspect", ("torch", "onnx", "onnxscript")),
        ("onetrans.cli.export", ("torch", "onnx", "onnxscript")),
        ("onetrans.cli.bench", ("torch", "onnx", "onnxscript")),
        ("onetrans.cli.doctor", ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")),
        ("onetrans.features.logs", ("torch", "onnx", "onnxruntime", "pyarrow")),
    ],
)
def test_light_imports_stay_light(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(sorted(set(sys.modules) & set({absent!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("path", [path for path in MODULES if path.name == "__init__.py"], ids=name_of)
def test_packages_say_what_they_are(path: Path) -> None:
    docstring = ast.get_docstring(tree_of(path))
    assert docstring
    assert len(docstring) > 20


def test_every_folder_of_modules_is_a_package() -> None:
    assert {path.parent for path in MODULES} == {path.parent for path in MODULES if path.name == "__init__.py"}


@pytest.mark.parametrize("path", [*MODULES, *TESTS], ids=name_of)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
