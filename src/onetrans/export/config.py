"""What to export to. Imports no torch, so that wrong arguments are refused at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onetrans.errors import ConfigError

TARGETS = ("onnx",)
PRECISIONS: Mapping[str, tuple[str, ...]] = {"onnx": ("fp32",)}
DTYPES = {"fp32": "float32"}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to export to.

    Attributes:
        target: One of TARGETS.
        precision: dtype of weights, activations and state.
        max_users: Greatest U of a batch.
        max_candidates: Greatest C of a request.
        seed: Of the parity cases.
    """

    target: str = "onnx"
    precision: str = "fp32"
    max_users: int = 64
    max_candidates: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ConfigError(f"unknown target {self.target!r}; allowed: {', '.join(TARGETS)}")
        if self.precision not in PRECISIONS[self.target]:
            allowed = ", ".join(PRECISIONS[self.target])
            raise ConfigError(f"target {self.target} cannot run precision {self.precision!r}; allowed: {allowed}")
        for field in ("max_users", "max_candidates"):
            if getattr(self, field) < 2:
                raise ConfigError(f"{field} is {getattr(self, field)}; it must be at least 2")
