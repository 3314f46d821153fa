"""A model's programs: its forward captured once, split into prefill and decode, and the append on top of a state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from onetrans.export.capture import capture_model
from onetrans.export.models.base import Bounds, ModelAdapter
from onetrans.export.passes.base import run_pass
from onetrans.export.passes.keep_rows import KeepRows
from onetrans.export.program import Program
from onetrans.export.split import Split, extract, split


@dataclass(frozen=True, kw_only=True)
class Programs:
    """What a bundle is lowered from.

    Attributes:
        split: How the forward was split.
        by_name: `prefill`, `decode` and, where it can be exact, `append`.
    """

    split: Split
    by_name: Mapping[str, Program]


def make_programs(model: ModelAdapter, bounds: Bounds, begin: Callable[[str], None] = lambda stage: None) -> Programs:
    """Captures and splits a model.

    Args:
        model: The model's adapter.
        bounds: Least and greatest size of every symbol of the inputs.
        begin: Called with each stage's name as it begins.

    Raises:
        ExportError: The graph cannot be captured or split.
    """
    begin("capture")
    whole, append = capture_model(model, bounds)
    begin("split")
    parts = split(whole)
    programs = {"prefill": parts.prefill, "decode": parts.decode}
    if append is not None:
        programs["append"] = run_pass(extract(append, parts.report.cut), KeepRows())
    return Programs(split=parts, by_name=programs)
