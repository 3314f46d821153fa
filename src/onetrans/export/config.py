"""What to export to. Imports no torch, so that wrong arguments are refused at once."""

from __future__ import annotations

from dataclasses import dataclass

from onetrans.errors import ConfigError
from onetrans.precision import precision
from onetrans.runtime import targets


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to export to.

    Attributes:
        target: A name in `onetrans.runtime.targets`; the table's first by default.
        precision: Short name of the dtype of weights, activations and state; the target's first by default.
        max_users: Greatest U of a batch.
        max_candidates: Greatest C of a request.
        seed: Seed of the parity cases.
    """

    target: str = targets.TABLE[0].name
    precision: str = ""
    max_users: int = 64
    max_candidates: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        row = targets.find(self.target)
        if not self.precision:
            object.__setattr__(self, "precision", row.precisions[0])
        precision(self.precision)
        if self.precision not in row.precisions:
            allowed = ", ".join(row.precisions)
            raise ConfigError(f"target {self.target} cannot run precision {self.precision!r}; allowed: {allowed}")
        for field in ("max_users", "max_candidates"):
            if getattr(self, field) < 2:
                raise ConfigError(f"{field} is {getattr(self, field)}; it must be at least 2")
