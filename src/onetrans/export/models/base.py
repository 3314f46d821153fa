"""The contract of an adapter, and the table that finds the one of a model."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch

from onetrans.errors import ExportError
from onetrans.features.windows import Pyramid
from onetrans.parity.cases import ParityCase
from onetrans.spec import TensorSpec

Bounds = Mapping[str, tuple[int, int]]

ADAPTERS = ("onetrans.export.models.onetrans:OneTransAdapter",)


@dataclass(frozen=True, kw_only=True)
class CaptureInputs:
    """What a model's forward is captured with.

    Attributes:
        arguments: Example inputs, nested as `forward` takes them; sizes of symbolic dimensions at least 2. They include
            the keys and values of a past where appending to a state can be exact.
        specs: One per tensor of `arguments`, in flattening order; those of the past say what they are in the state.
        bounds: Least and greatest size of every symbol in the specs' dims.
    """

    arguments: tuple[Any, ...]
    specs: tuple[TensorSpec, ...]
    bounds: Bounds


class ModelAdapter(Protocol):
    """A model of one family, as export sees it.

    Attributes:
        family: The family's name, for the manifest.
        module: The model in eval mode; its one `forward` is what gets captured.
        name: The model's name.
        config: The model's configuration as plain data; it holds `schema` and `merge`, which encode requests.
        description: The model's sizes in words, for the picture: name to value.
        tasks: Names of the forward's results, in order.
        pyramid: The windows of every layer.
    """

    family: str
    module: torch.nn.Module
    name: str
    config: Mapping[str, Any]
    description: Mapping[str, str]
    tasks: tuple[str, ...]
    pyramid: Pyramid

    @classmethod
    def accepts(cls, model: object) -> bool:
        """Whether a model is of this family."""

    def __init__(self, model: Any) -> None:
        """Takes a model that `accepts` accepts; it is put into eval mode and otherwise left as it is."""

    def bounds(self, *, max_users: int, max_candidates: int) -> dict[str, tuple[int, int]]:
        """Least and greatest U (users), C (candidates of each) and L (tokens of a window)."""

    def capture_inputs(self, bounds: Bounds) -> CaptureInputs:
        """What the forward is captured with, within the bounds."""

    def example_inputs(self, seed: int, sizes: Mapping[str, int] | None = None) -> dict[str, torch.Tensor]:
        """Feature inputs by name; two seeds differ in every event, feature and length.

        Args:
            seed: Seed of the values.
            sizes: Size of every symbol; those of the capture's example if left out.
        """

    def cases(self, bounds: Bounds, seed: int) -> list[ParityCase]:
        """Parity cases: lengths 0, 1, short, full and beyond, several users, one candidate and many, and appends."""

    def weights_sha256(self) -> str:
        """Hash of the weights."""


def adapt(model: object) -> ModelAdapter:
    """The adapter of a model; one that is an adapter already is taken as it is.

    Raises:
        ExportError: No family accepts the model.
    """
    families = []
    for path in ADAPTERS:
        module, name = path.split(":")
        family: type[ModelAdapter] = getattr(importlib.import_module(module), name)
        if isinstance(model, family):
            return model
        if family.accepts(model):
            return family(model)
        families.append(family.family)
    if hasattr(model, "capture_inputs"):
        return cast(ModelAdapter, model)
    raise ExportError(
        f"{type(model).__name__} is of no model family that can be exported ({', '.join(families)}); give it an adapter"
        " (docs/extending.md)"
    )
