"""A model behind an adapter: export knows it by the protocol alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import onetrans.export
from onetrans.errors import ExportError
from onetrans.export import export
from onetrans.export.models.base import Bounds, CaptureInputs, adapt
from onetrans.export.models.onetrans import OneTransAdapter
from onetrans.model.checkpoint import random_model
from onetrans.model.onetrans import OneTrans
from onetrans.parity.cases import ParityCase
from onetrans.runtime import Ranker
from parity_tests.configs import small_config
from parity_tests.conftest import request_of

SOURCE = Path(onetrans.export.__file__).parent


class Calibrated(nn.Module):
    """A model that is no OneTrans and holds one: its logits are scaled and moved."""

    def __init__(self, inner: OneTrans) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, user: Any, candidate: Any, past: Any = None) -> dict[str, torch.Tensor]:
        return {task: 2 * logits + 1 for task, logits in self.inner(user, candidate, past).items()}


class CalibratedAdapter:
    """Built on OneTrans's by delegation, as a family of one's own would be."""

    family = "calibrated"

    def __init__(self, model: Calibrated) -> None:
        self.module = model.eval()
        self._inner = OneTransAdapter(model.inner)
        self.name, self.tasks, self.pyramid = "calibrated-small", self._inner.tasks, self._inner.pyramid
        self.config: Mapping[str, Any] = {name: self._inner.config[name] for name in ("schema", "merge")}
        self.description = {"scale": "2"}

    @classmethod
    def accepts(cls, model: object) -> bool:
        return isinstance(model, Calibrated)

    def weights_sha256(self) -> str:
        return self._inner.weights_sha256()

    def bounds(self, *, max_users: int, max_candidates: int) -> dict[str, tuple[int, int]]:
        return self._inner.bounds(max_users=max_users, max_candidates=max_candidates)

    def capture_inputs(self, bounds: Bounds) -> CaptureInputs:
        return self._inner.capture_inputs(bounds)

    def example_inputs(self, seed: int, sizes: Mapping[str, int] | None = None) -> dict[str, torch.Tensor]:
        return self._inner.example_inputs(seed, sizes)

    def cases(self, bounds: Bounds, seed: int) -> list[ParityCase]:
        cases = []
        for case in self._inner.cases(bounds, seed):
            for logits in (case.reference, case.eager):
                logits.update({task: 2 * value + 1 for task, value in logits.items()})
            cases.append(case)
        return cases


@pytest.mark.slow
def test_a_model_of_another_family_becomes_a_bundle(tmp_path: Path) -> None:
    """Its configuration has no `d`, `heads` or `l_ns`; nothing between capture and scores asks for them."""
    inner = random_model(small_config(), 0)
    bundle = export(CalibratedAdapter(Calibrated(inner)), tmp_path / "bundle")
    manifest = bundle.manifest
    assert (manifest.family, manifest.name, sorted(manifest.model)) == (
        "calibrated",
        "calibrated-small",
        ["merge", "schema"],
    )
    assert len(manifest.parity["results"]) == 9
    assert all(result["passed"] for result in manifest.parity["results"])
    plain = export(inner, tmp_path / "plain")
    request = request_of(manifest.schema, events=40, candidates=5)
    asked = {"history": request.history, "profile": request.profile, "candidates": request.candidates}
    found, expected = (Ranker.open(opened.path).rank(**asked).logits for opened in (bundle, plain))
    for task, logits in expected.items():
        assert abs(found[task] - (2 * logits + 1)).max() < 1e-5


def test_adapt_finds_the_family_or_says_which_there_are() -> None:
    model = random_model(small_config(), 0)
    made = adapt(model)
    assert isinstance(made, OneTransAdapter)
    assert adapt(made) is made
    with pytest.raises(
        ExportError, match=r"^Linear is of no model family that can be exported \(onetrans\); give it an"
    ):
        adapt(nn.Linear(2, 2))


def test_only_the_adapter_knows_the_family() -> None:
    for path in SOURCE.rglob("*.py"):
        if path.parent.name != "models":
            text = path.read_text(encoding="utf-8")
            assert "onetrans.model" not in text.replace("onetrans.export.models", ""), path
            for name in ('"d"', '"heads"', '"l_ns"'):
                assert name not in text, path


def test_the_writer_knows_no_graph_format() -> None:
    text = (SOURCE / "writer.py").read_text(encoding="utf-8")
    assert not [word for word in ("onnx", "torch", "weights.safetensors", "WEIGHTS_FILE") if word in text]
