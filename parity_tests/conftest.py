"""One tiny model, its checkpoint and its bundle for the whole session, and the command line as users run it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import parity_tests.triton_device  # noqa: F401  (before anything imports Triton, which reads its mode then)
from onetrans.cli.main import cli, run
from onetrans.export import export
from onetrans.features.random_requests import random_request
from onetrans.features.requests import Request, write_requests
from onetrans.features.schema import FeatureSchema
from onetrans.model.checkpoint import random_model, save_checkpoint
from onetrans.model.onetrans import OneTrans
from onetrans.model.presets import preset
from onetrans.runtime.backends.base import BackendOptions
from onetrans.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from onetrans.runtime.bundle import Bundle
from parity_tests.configs import VARIANTS, small_config

if TYPE_CHECKING:
    from parity_tests.states import Reference

Command = Callable[..., "subprocess.CompletedProcess[str]"]
MAIN = (sys.executable, "-m", "onetrans.cli.main")
UNMARKED_SECONDS = 20  # of CPU, which is ten seconds of the two cores that `make check` counts on


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Fails a test that takes long and does not say so. CPU seconds: a busy machine makes no test slow."""
    before = sum(os.times()[:4])  # children's too, once they have been waited for
    yield
    taken = sum(os.times()[:4]) - before
    if taken > UNMARKED_SECONDS and not item.get_closest_marker("slow"):
        pytest.fail(f"took {taken:.0f} s of CPU; mark it slow or make it cheaper (limit {UNMARKED_SECONDS} s)")


def trained_like(model: OneTrans, seed: int) -> OneTrans:
    """Random weights at a trained model's scale; fresh ones give all candidates of a long history about one score."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.mul_(1 + 0.3 * torch.randn(weight.shape, generator=generator))
            elif "embeddings" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator))
            else:
                weight.mul_(2.0 if "heads" in name else 1.5)
    return model


@pytest.fixture(scope="session")
def tiny_model() -> OneTrans:
    """Not to be changed."""
    return trained_like(random_model(preset("tiny"), 0), 0)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model: OneTrans, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("session") / "checkpoint"
    save_checkpoint(tiny_model, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model: OneTrans, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed: take `bundle`, a copy."""
    folder = tmp_path_factory.mktemp("session") / "bundle"
    export(tiny_model, folder)
    return folder


@pytest.fixture(scope="session")
def one_layer_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For exports that are stopped: as large as tiny's, for its tables, and exported in half the time."""
    folder = tmp_path_factory.mktemp("session") / "checkpoint"
    save_checkpoint(random_model(dataclasses.replace(preset("tiny"), layers=1), 0), folder)
    return folder


@pytest.fixture(scope="session")
def intent_model() -> OneTrans:
    """A small model whose history is ordered by intent, so that nothing can be appended. Not to be changed."""
    return trained_like(random_model(small_config(**VARIANTS["intent"]), 0), 0)


@pytest.fixture(scope="session")
def intent_bundle(intent_model: OneTrans, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    folder = tmp_path_factory.mktemp("session") / "intent"
    export(intent_model, folder)
    return folder


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def requests_file(tmp_path: Path) -> Path:
    """`requests.json`: three requests for the tiny model, of 12 candidates each."""
    path = tmp_path / "requests.json"
    schema = preset("tiny").schema
    made = [request_of(schema, events=events, candidates=12, seed=events) for events in (0, 70, 300)]
    named = [dataclasses.replace(request, request=f"request {index}") for index, request in enumerate(made)]
    write_requests(path, named)
    return path


@pytest.fixture(scope="session")
def run_cli() -> Command:
    """Runs `onetrans ARGS…` in a process of its own."""

    def call(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
        options = {"capture_output": True, "text": True, "timeout": 300, **options}
        return subprocess.run([*MAIN, *map(str, args)], **options, check=False)

    return call


@pytest.fixture
def run_here(capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs `onetrans ARGS…` in this process, which has imported torch already."""

    def call(*args: object) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        status = run(cli, [str(arg) for arg in args])
        return subprocess.CompletedProcess(args, status, *capfd.readouterr())

    return call


def error_line(result: subprocess.CompletedProcess[str], status: int) -> str:
    """The one line that a failed command leaves at the end of stderr; nothing on stdout, and no traceback."""
    assert result.returncode == status, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("error:")] == lines[-1:], result.stderr
    assert "internal error" not in lines[-1]
    return lines[-1].removeprefix("error: ")


def listing(folder: Path) -> dict[str, str]:
    """Everything in a folder, hidden entries too: relative path to sha256 (of a folder, nothing)."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def rehash(bundle: Path, change: Callable[[dict[str, Any]], object] = lambda body: None) -> None:
    """Makes a changed bundle consistent again, as a forger would: every hash, every size and the manifest's digest."""
    path = bundle / "manifest.json"
    body = json.loads(path.read_text(encoding="utf-8"))
    for name, stated in body["files"].items():
        if (bundle / name).is_file():
            content = (bundle / name).read_bytes()
            stated.update(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    change(body)
    body.pop("digest", None)
    body["digest"] = hashlib.sha256(canonical(body).encode("utf-8", "surrogatepass")).hexdigest()
    path.write_bytes(canonical(body).encode("utf-8", "surrogatepass"))


def canonical(body: Mapping[str, Any]) -> str:
    """The form of a manifest, stated anew."""
    return json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def request_of(schema: FeatureSchema, *, events: int, candidates: int, seed: int = 0) -> Request:
    return random_request(schema, events=events, candidates=candidates, rng=np.random.default_rng(seed))


def as_rows(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Columns as one dict of plain values per row."""
    plain = {name: np.asarray(column).tolist() for name, column in columns.items()}
    return [dict(zip(plain, row, strict=True)) for row in zip(*plain.values(), strict=True)]


@pytest.fixture(scope="module")
def backend(tiny_bundle: Path) -> OnnxRuntimeCpu:
    """The tiny bundle's, with one thread."""
    return OnnxRuntimeCpu(Bundle.open(tiny_bundle), BackendOptions(threads=1))


@pytest.fixture(scope="module")
def reference(tiny_model: OneTrans) -> Reference:
    """The tiny model's one pass in float64, and the bound."""
    from parity_tests.states import Reference  # it imports this file

    return Reference(tiny_model)
