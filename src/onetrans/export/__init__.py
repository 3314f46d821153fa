"""Export: capture, split, passes, targets, the bundle writer and verify.

`export` is imported when it is asked for, so that `onetrans.parity.verify` works without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onetrans.errors import ConfigError, ExportError, OneTransError, OutputExistsError, ParityError
from onetrans.export.config import ExportConfig

if TYPE_CHECKING:
    from onetrans.export.pipeline import export

__all__ = [
    "ConfigError",
    "ExportConfig",
    "ExportError",
    "OneTransError",
    "OutputExistsError",
    "ParityError",
    "export",
]


def __getattr__(name: str) -> Any:
    if name == "export":
        from onetrans.export.pipeline import export

        return export
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
