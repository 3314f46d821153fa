"""The table of targets: a target of another package goes through every verb, and names are found or refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onetrans.errors import BundleError, ConfigError, MissingDependencyError
from onetrans.export.config import ExportConfig
from onetrans.parity.cases import read_cases
from onetrans.runtime import targets
from onetrans.runtime.backends.base import Backend, BackendOptions
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.ranker import Ranker
from parity_tests.conftest import Command, error_line, rehash, request_of
from parity_tests.toy_target import TOY

ROOT = Path(__file__).resolve().parents[1]
ENTRY_POINTS = f"""[{targets.GROUP}]
toy = parity_tests.toy_target:TOY
toy-code = parity_tests.toy_target:TOY_CODE
broken = parity_tests.toy_target:NOTHING
other = parity_tests.toy_target:TOY
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that, on the path, is an installed package with targets."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "toys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(site))
    for cached in (targets._plugins, targets.find):
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in (targets._plugins, targets.find):
        cached.cache_clear()


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_toy(run_cli: Command, site: Path) -> Run:
    """The command line of an installation that has the toys."""
    path = os.pathsep.join([str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

    def call(*args: object) -> subprocess.CompletedProcess[str]:
        return run_cli(*args, env={**os.environ, "PYTHONPATH": path})

    return call


@pytest.mark.slow
def test_a_target_of_another_package_is_exported_verified_scored_and_benched(
    run_toy: Run, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    toy = tmp_path / "toy"
    made = run_toy("export", "--checkpoint", tiny_checkpoint, "--target", "toy", "--output", toy, "--json")
    assert made.returncode == 0, made.stderr
    assert sorted(path.name for path in toy.iterdir() if path.suffix == ".toy") == [
        "append.toy",
        "decode.toy",
        "prefill.toy",
    ]
    verified = run_toy("verify", toy, "--json")
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["passed"] is True
    request = request_of(Bundle.open(tiny_bundle).manifest.schema, events=70, candidates=5)
    plain = {"history": request.history, "profile": request.profile, "candidates": request.candidates}
    source = tmp_path / "request.json"
    source.write_text(json.dumps(plain, default=lambda value: value.tolist()))
    scored = run_toy("score", toy, "--input", source, "--device", "toybox", "--json")
    assert scored.returncode == 0, scored.stderr
    (found,) = json.loads(scored.stdout)["requests"]
    expected = Ranker.open(tiny_bundle).rank(
        history=request.history, profile=request.profile, candidates=request.candidates
    )
    for task, logits in expected.logits.items():
        assert np.allclose(found["logits"][task], logits, rtol=1e-6, atol=1e-6)
    benched = run_toy("bench", toy, "--requests", 20, "--candidates", 3, "--events", 5, "--json")
    assert benched.returncode == 0, benched.stderr
    record = json.loads(benched.stdout)
    assert (record["bundle"]["target"], record["bundle"]["device"]) == ("toy", "toybox")
    doctor = json.loads(run_toy("doctor", "--json").stdout)
    assert doctor["missing"]["serve toy bundles"] == ["toy-engine"]
    assert doctor["missing"]["use target broken"] == ["broken"]
    assert "toy" in run_toy("export", "--help").stdout
    assert error_line(run_toy("verify", toy, "--device", "cpu"), 2).endswith(
        "cannot run on 'cpu'; target toy runs it on toybox"
    )


def test_a_bundle_of_an_absent_target_is_refused(bundle: Path) -> None:
    rehash(bundle, lambda body: body.update(target="toy"))
    with pytest.raises(BundleError, match="was made for target 'toy'; this installation runs onnx"):
        Bundle.open(bundle)


def test_programs_open_only_where_they_are_trusted(bundle: Path, installed: None) -> None:
    rehash(bundle, lambda body: body.update(target="toy-code", device="toybox"))
    with pytest.raises(BundleError, match=r'holds programs .* open it with trust="code"'):
        Bundle.open(bundle)
    with pytest.raises(BundleError, match=r'open it with trust="code"'):
        Ranker.open(bundle)
    with pytest.raises(BundleError, match="cannot load"):  # trusted, so that the engine is asked; it is no toy's file
        Ranker.open(bundle, trust="code")
    opened = Bundle.open(bundle, trust="code")
    with pytest.raises(ConfigError, match="cannot run on 'cpu'; target toy-code runs it on toybox"):
        targets.open_backend(opened, "cpu")


def test_names_that_are_not_known(installed: None) -> None:
    assert targets.names()[0] == targets.TABLE[0].name
    assert {"toy", "toy-code"} <= set(targets.names())
    assert targets.find("toy") == TOY
    with pytest.raises(ConfigError, match=r"^unknown target 'tou'; did you mean 'toy'\? allowed: "):
        ExportConfig(target="tou")
    with pytest.raises(ConfigError, match=r"^unknown target 'zzz'; allowed: onnx"):
        ExportConfig(target="zzz")
    with pytest.raises(ConfigError, match="target 'broken' of another package cannot be loaded"):
        ExportConfig(target="broken")
    with pytest.raises(ConfigError, match=r"entry point 'other' of group onetrans.targets is no Target of that name"):
        ExportConfig(target="other")
    with pytest.raises(ConfigError, match=r"^target toy cannot run precision 'bf16'; allowed: fp32"):
        ExportConfig(target="toy", precision="bf16")
    with pytest.raises(ConfigError, match=r"^unknown precision 'fp23'"):
        ExportConfig(precision="fp23")


def test_a_target_without_a_backend_or_a_precision_is_none() -> None:
    for change in ({"backends": {}}, {"precisions": ()}):
        with pytest.raises(ConfigError, match="states no precision or no backend"):
            dataclasses.replace(TOY, **change)


def test_an_absent_package_or_device_is_never_replaced_by_another(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = dataclasses.replace(
        targets.find("onnx"), backends={"gpu": f"{__name__}:NeedsDriver", **targets.find("onnx").backends}
    )
    monkeypatch.setattr(targets, "find", lambda name: row)
    opened = Bundle.open(tiny_bundle)
    with pytest.raises(MissingDependencyError, match="no driver"):
        targets.open_backend(opened)
    assert targets.open_backend(opened, "cpu").device == "cpu"
    with pytest.raises(ConfigError, match="cannot run on 'tpu'; target onnx runs it on gpu, cpu"):
        Ranker.open(tiny_bundle, device="tpu")


class NeedsDriver(Backend):  # type: ignore[abstract]
    def __new__(cls, bundle: Bundle, options: BackendOptions) -> NeedsDriver:
        raise MissingDependencyError("no driver: install one")


def test_packages_and_extras_of_the_table() -> None:
    assert {"torch", "onnxruntime"} <= set(targets.packages())
    assert (targets.extra_of("onnxruntime"), targets.extra_of("onnxscript")) == ("serve", "cpu")
    assert targets.extra_of("numpy") is None


def test_the_extras_install_what_the_table_says() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for row in targets.TABLE:
        for extra, needed in ((row.export_extra, row.export_packages), (row.serve_extra, row.serve_packages)):
            listed = {re.split(r"[><=;\[ ]", requirement)[0] for requirement in extras[extra]}
            assert all(listed & set(alternatives) for alternatives in needed), (row.name, extra)


def test_every_row_names_what_exists(tiny_bundle: Path) -> None:
    for row in targets.TABLE:
        lowering = targets.load(row.lowering)
        assert callable(lowering.lower)
        assert callable(lowering.write)
        assert all(issubclass(targets.load(path), Backend) for path in row.backends.values())
        assert not row.file_check or callable(targets.load(row.file_check))
    assert len({row.name for row in targets.TABLE}) == len(targets.TABLE)
    assert read_cases(Bundle.open(tiny_bundle))


def test_no_target_is_named_outside_the_table_lowerings_and_backends() -> None:
    """Nobody asks `if target == …`: a target's name stands in its row, its lowering and its backends."""
    source = ROOT / "src" / "onetrans"
    allowed = [source / "runtime" / "targets.py", source / "runtime" / "backends", source / "export" / "targets"]
    names = [row.name for row in targets.TABLE]
    for path in source.rglob("*.py"):
        if not any(path.is_relative_to(place) for place in allowed):
            text = path.read_text(encoding="utf-8")
            assert not [name for name in names if f'"{name}"' in text or f"'{name}'" in text], path
