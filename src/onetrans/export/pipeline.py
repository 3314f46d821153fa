"""Export: a trained model becomes a verified bundle."""

from __future__ import annotations

import dataclasses
import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from onetrans.export.config import ExportConfig
from onetrans.export.gold import build_cases
from onetrans.export.inputs import capture_model, probe
from onetrans.export.passes.keep_rows import keep_rows
from onetrans.export.split import extract, split
from onetrans.export.writer import make_manifest, write_gold, write_graphs, write_manifest
from onetrans.files import new_folder
from onetrans.model.onetrans import OneTrans
from onetrans.parity.verify import CaseResult, check, read_cases, verify
from onetrans.runtime.backends.registry import open_backend
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.manifest import Manifest

log = logging.getLogger(__name__)


def export(
    model: OneTrans,
    output: str | Path,
    config: ExportConfig | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Bundle:
    """Captures, splits, lowers, writes and verifies a model.

    The bundle appears under its name only after it was verified; a crash leaves the folder that was there, or none.

    Args:
        model: In float32.
        output: A folder that does not exist yet.
        config: Target, precision and bounds.
        progress: Called with each stage's name as it begins.

    Raises:
        ConfigError: An unknown target or precision.
        OutputExistsError: `output` exists.
        ExportError: The graph cannot be captured, split or lowered.
        ParityError: The bundle is too far from gold.
    """
    config = config or ExportConfig()
    model = model.eval()
    stages = _Stages(progress)
    with new_folder(output) as folder, _collector_at_rest():
        stages.begin("capture")
        whole, append = capture_model(model, config)
        stages.begin("split")
        parts = split(whole)
        programs = {"prefill": parts.prefill, "decode": parts.decode}
        if append is not None:
            programs["append"], _ = keep_rows(extract(append, parts.prefill.outputs))
        stages.begin("probe")
        probe(model.config, parts)
        stages.begin("gold")
        cases = build_cases(model, max_candidates=config.max_candidates, max_users=config.max_users, seed=config.seed)
        stages.begin("lower")
        graphs = write_graphs(programs, parts.report, model.config, folder)
        stages.begin("write")
        write_gold(cases, folder)
        manifest = make_manifest(model, config, graphs, parts.report, cases, folder)
        stages.begin("verify")
        results = _verify(manifest, folder)
        parity = {"case_names": [case.name for case in cases], "results": [dataclasses.asdict(r) for r in results]}
        write_manifest(dataclasses.replace(manifest, parity=parity), folder)
        stages.end()
    return Bundle.open(output)


def _verify(manifest: Manifest, folder: Path) -> list[CaseResult]:
    write_manifest(manifest, folder)
    bundle = Bundle.open(folder)
    results = verify(bundle, open_backend(bundle), read_cases(bundle))
    check(results)
    return results


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Tracing makes millions of small objects that live on; searching them for garbage takes a seventh of an export."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _Stages:
    """Reports each stage as it begins, and how long it took."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self.progress = progress
        self.name = ""
        self.began = 0.0

    def begin(self, name: str) -> None:
        self.end()
        self.name, self.began = name, time.perf_counter()
        self.progress(name)

    def end(self) -> None:
        if self.name:
            log.info("stage %s: %.0f ms", self.name, 1e3 * (time.perf_counter() - self.began))
        self.name = ""
