"""The contract of a lowering: programs in, artifacts with their input and output specs out, then files.

A target's lowering is a module with the two functions of `Lowering`; the table of targets names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from onetrans.export.program import Program
from onetrans.runtime.manifest import Graph
from onetrans.spec import TensorSpec

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Artifact(Generic[Value]):
    """One lowered program.

    Attributes:
        value: What the target makes of it: an ONNX model, a program over kernels.
        inputs: One spec per input, in order.
        outputs: One spec per output, in order.
    """

    value: Value
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Lowering(Protocol[Value]):
    """What a lowering's module offers."""

    def lower(self, programs: Mapping[str, Program]) -> dict[str, Artifact[Value]]:
        """Lowers the programs of a bundle, by name: `prefill`, `decode` and, where it can be exact, `append`.

        Raises:
            ExportError: A program cannot be lowered; which one, and why.
        """

    def write(self, artifacts: Mapping[str, Artifact[Value]], folder: Path) -> dict[str, Graph]:
        """Writes the files of the lowered programs into an unfinished bundle; returns their entries in the manifest."""
