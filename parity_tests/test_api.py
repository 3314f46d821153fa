"""The public API: what a user imports, from where; and nothing public that only tests use."""

from __future__ import annotations

import ast
import importlib
import tomllib

import pytest

import onetrans
from onetrans import errors
from parity_tests.usage import ROOT, Uses, definitions, trees

SERVING = {"Ranker", "Scores", "Request", "CacheConfig", "Metrics", "Bundle", "BackendOptions"}
SERVING_ERRORS = {"BundleError", "ConfigError", "DataError", "JobError", "MissingDependencyError", "StateError"}
EXPORTING = {"export", "ExportConfig"}
EXPORTING_ERRORS = {"ConfigError", "ExportError", "OutputExistsError", "ParityError"}


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("onetrans.runtime", SERVING | SERVING_ERRORS | {"OneTransError"}),
        ("onetrans.export", EXPORTING | EXPORTING_ERRORS | {"OneTransError"}),
    ],
)
def test_a_package_exports_what_its_users_name(module: str, names: set[str]) -> None:
    found = importlib.import_module(module)
    assert set(found.__all__) == names
    assert list(found.__all__) == sorted(found.__all__)
    assert all(getattr(found, name).__name__ == name for name in names)


def test_errors_of_the_packages_are_those_of_the_table() -> None:
    for module, names in (("onetrans.runtime", SERVING_ERRORS), ("onetrans.export", EXPORTING_ERRORS)):
        for name in names:
            error = getattr(importlib.import_module(module), name)
            assert error is getattr(errors, name)
            assert issubclass(error, errors.OneTransError)


def test_every_all_is_complete_and_importable() -> None:
    """Where a package states `__all__`, it names all that the package imports; and every name can be had."""
    stated = 0
    for module, tree in trees("src/onetrans").items():
        names = [n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
        if not names:
            continue
        stated += 1
        found = importlib.import_module(module)
        assert [name for name in found.__all__ if not hasattr(found, name)] == [], module
        if found.__file__ is not None and found.__file__.endswith("__init__.py"):
            imported = {a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
            typing = {"annotations", "Any", "TYPE_CHECKING"}
            assert imported - typing <= set(found.__all__), module
    assert stated >= 6


def test_the_version_stands_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"] == {"version": {"attr": "onetrans.__version__"}}
    quoted = f'"{onetrans.__version__}"'
    files = [ROOT / "pyproject.toml", *(ROOT / "src").rglob("*.py")]
    assert [path.name for path in files if quoted in path.read_text(encoding="utf-8")] == ["__init__.py"]
    assert f"\n## [{onetrans.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_nothing_public_is_there_for_tests_alone() -> None:
    """Each public function, class, constant and method is used by the package, its benchmarks, or named in the docs."""
    program = trees("src/onetrans", "benchmarks")
    uses = Uses(program)
    for page in (ROOT / "README.md", ROOT / "pyproject.toml", *(ROOT / "docs").glob("*.md")):
        uses.read_page(page.read_text(encoding="utf-8"))
    unused = [
        f"{module}.{name}"
        for module, tree in program.items()
        if module.startswith("onetrans")
        for name, _ in definitions(tree)
        if (module, name) not in uses
    ]
    assert not unused, "\n".join(unused)


def test_a_use_is_told_from_a_definition() -> None:
    """That the index finds each kind of use, and takes neither a definition, recursion nor a re-export for one."""
    texts = {
        "onetrans.a": (
            "A = 1\nB = 2\nC = A\ndef f():\n    return f()\nclass K:\n    def m(self): pass\n    def n(self): pass"
        ),
        "onetrans.p": "from onetrans.a import f, C\nfrom onetrans.a import K as K",
        "onetrans.p.q": (
            "from onetrans import a as other\nfrom onetrans.p import K\nx = other.B\nK().m()\n'onetrans.a:C'"
        ),
    }
    uses = Uses({module: ast.parse(text) for module, text in texts.items()})
    names = [name for name, _ in definitions(ast.parse(texts["onetrans.a"]))]
    assert names == ["A", "B", "C", "f", "K", "K.m", "K.n"]
    assert [name for name in names if ("onetrans.a", name) not in uses] == ["f", "K.n"]
