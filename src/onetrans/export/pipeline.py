"""Export: a trained model becomes a verified bundle."""

from __future__ import annotations

import dataclasses
import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from onetrans.export.config import ExportConfig
from onetrans.export.models.base import adapt
from onetrans.export.probe import Values, probe_split
from onetrans.export.programs import make_programs
from onetrans.export.split import Split
from onetrans.export.targets.base import Lowering
from onetrans.export.writer import make_manifest, write_manifest
from onetrans.files import new_folder
from onetrans.parity.cases import read_cases, write_cases
from onetrans.parity.comparison import CaseResult
from onetrans.parity.verify import check, verify
from onetrans.runtime import targets
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.manifest import Manifest
from onetrans.spec import Scope

log = logging.getLogger(__name__)


def export(
    model: object,
    output: str | Path,
    config: ExportConfig | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Bundle:
    """Captures, splits, lowers, writes and verifies a model.

    The bundle appears under its name only after it was verified; a crash leaves the folder that was there, or none.

    Args:
        model: A model of a known family in float32, or an adapter of one.
        output: A folder that does not exist yet.
        config: Target, precision and bounds.
        progress: Called with each stage's name as it begins.

    Raises:
        ConfigError: An unknown target or precision.
        OutputExistsError: `output` exists.
        ExportError: The graph cannot be captured, split or lowered.
        ParityError: The bundle is too far from the reference.
    """
    config = config or ExportConfig()
    target, adapter = targets.find(config.target), adapt(model)
    bounds = adapter.bounds(max_users=config.max_users, max_candidates=config.max_candidates)
    stages = _Stages(progress)
    with new_folder(output) as folder, _collector_at_rest():
        programs = make_programs(adapter, bounds, stages.begin)
        stages.begin("probe")
        examples = [adapter.example_inputs(seed) for seed in (0, 1)]
        probe_split(programs.split, *(_of_scope(programs.split, examples, scope) for scope in get_args(Scope)))
        stages.begin("reference")
        cases = adapter.cases(bounds, config.seed)
        stages.begin("lower")
        lowering: Lowering[Any] = targets.load(target.lowering)
        artifacts = lowering.lower(programs.by_name)
        stages.begin("write")
        graphs = lowering.write(artifacts, folder)
        write_cases(cases, folder)
        manifest = make_manifest(adapter, config, graphs, programs.split.report, cases, folder)
        stages.begin("verify")
        results = _verify(manifest, folder, target.trust)
        parity = {"case_names": [case.name for case in cases], "results": [dataclasses.asdict(r) for r in results]}
        write_manifest(dataclasses.replace(manifest, parity=parity), folder)
        stages.end()
    return Bundle.open(output, trust=target.trust)


def _verify(manifest: Manifest, folder: Path, trust: targets.Trust) -> list[CaseResult]:
    write_manifest(manifest, folder)
    bundle = Bundle.open(folder, trust=trust)
    results = verify(targets.open_backend(bundle), read_cases(bundle))
    check(results)
    return results


def _of_scope(parts: Split, examples: Sequence[Values], scope: Scope) -> tuple[Values, Values]:
    """The inputs of one scope, of two examples."""
    names = [spec.name for spec in parts.whole.inputs if spec.scope == scope]
    one, other = ({name: example[name] for name in names} for example in examples)
    return one, other


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
