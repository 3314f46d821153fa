"""Who uses what is public in the package: an index of definitions and uses, read from the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
DOTTED = re.compile(r"\bonetrans(?:\.\w+)+(?::\w+)?")
IMPORTED = re.compile(r"^from (onetrans[\w.]*) import ([\w, ]+)$", re.M)
CALLED = re.compile(r"`(?:\w+\.)?(\w+)\(")
Name = tuple[str, str]  # module, name


def module_of(path: Path) -> str:
    """`src/onetrans/files.py` is `onetrans.files`; a package has its folder's name."""
    parts = path.relative_to(SOURCE if path.is_relative_to(SOURCE) else ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def trees(*folders: str) -> dict[str, ast.Module]:
    """Module to syntax tree, of every file in these folders."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def definitions(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """Public functions, classes and constants of a module, and public methods as `Class.method`.

    Left out: click commands, which their group finds by name, and methods of classes with a base, which calls them.
    """
    for node in tree.body:
        names: list[str] = []
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [] if any("command" in ast.unparse(d) for d in node.decorator_list) else [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        yield from ((name, node) for name in names if not name.startswith("_"))
        if isinstance(node, ast.ClassDef) and not node.bases and not node.name.startswith("_"):
            methods = [m for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")]
            yield from ((f"{node.name}.{method.name}", method) for method in methods)


def imports(tree: ast.Module) -> dict[str, str]:
    """What a name of this file stands for: a module, or a module's name, as a dotted path."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                found[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


class Uses:
    """Every use in some modules: of a module's name where that can be told, else of an attribute of that name."""

    def __init__(self, modules: dict[str, ast.Module]) -> None:
        self.modules = modules
        self.names: set[Name] = set()
        self.attributes: set[str] = set()
        for module, tree in modules.items():
            self._read(module, tree)

    def _resolve(self, dotted: str) -> Name:
        """Follows what packages re-export to where it is defined."""
        module, _, name = dotted.rpartition(".")
        while module in self.modules:
            onward = {n: p for n, p in self._exports(module).items() if p != f"{module}.{name}"}
            if name not in onward:
                break
            module, _, name = onward[name].rpartition(".")
        return module, name

    def _exports(self, module: str) -> dict[str, str]:
        return {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in self.modules[module].body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }

    def _read(self, module: str, tree: ast.Module) -> None:
        known = imports(tree)
        reexports = set(self._exports(module).values()) if tree.body and _is_package(self.modules, module) else set()
        self.names |= {self._resolve(path) for path in set(known.values()) - reexports}
        own = dict(definitions(tree))
        for outer in tree.body:
            for node in ast.walk(outer):
                if isinstance(node, ast.Attribute):
                    base = ast.unparse(node.value)
                    head, _, rest = base.partition(".")
                    path = ".".join(filter(None, [known.get(head, ""), rest])) if head in known else ""
                    if path in self.modules:
                        self.names.add(self._resolve(f"{path}.{node.attr}"))
                    else:
                        self.attributes.add(node.attr)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and own.get(node.id) is not outer:
                    self.names.add((module, node.id))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    self.read_text(node.value)

    def read_text(self, text: str) -> None:
        """Dotted paths that a text names, as documentation and messages do."""
        self.names |= {self._resolve(found.replace(":", ".")) for found in DOTTED.findall(text)}

    def read_page(self, text: str) -> None:
        """The same, and what documentation imports, and methods that it calls: `reload(path)`."""
        self.read_text(text)
        for module, names in IMPORTED.findall(text):
            self.names |= {self._resolve(f"{module}.{name.strip()}") for name in names.split(",")}
        self.attributes |= set(CALLED.findall(text))

    def __contains__(self, name: Name) -> bool:
        return name in self.names or name[1].rpartition(".")[2] in self.attributes


def _is_package(modules: dict[str, ast.Module], module: str) -> bool:
    return any(other.startswith(f"{module}.") for other in modules)
