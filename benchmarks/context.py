"""The one context of a run: device, timer, rates, work folder, and what is made once for all measures.

This is where measures meet export and runtime: bundles, rankers, adapters and captured programs come from here.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onetrans.bench.environment import cpu_model, gpu_state, libraries
from onetrans.bench.processes import answering, last_line, measure_process
from onetrans.bench.rates import Rates
from onetrans.bench.record import files_hash
from onetrans.bench.runner import Measure, Options, Suite
from onetrans.errors import JobError
from onetrans.model.config import ModelConfig
from onetrans.model.presets import preset
from onetrans.parity.cases import read_cases
from onetrans.parity.comparison import CaseResult
from onetrans.parity.verify import check, verify
from onetrans.runtime.backends.base import BackendOptions
from onetrans.runtime.cache.config import CacheConfig
from onetrans.runtime.ranker import Ranker

if TYPE_CHECKING:
    from onetrans.bench.timing import Timer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SEED = 0
LARGE, SMALL = "onetrans-s", "tiny"  # the model that CPU targets are stated for, and a small one


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured of a model on a GPU."""

    config: ModelConfig
    history: int  # events that kernels see in a fresh prefill
    prefill: int  # events of the prefill program
    before: int  # events of the state that an append meets
    new: int  # events of an append
    candidates: tuple[int, ...]  # C of every decode
    request: int  # C of the whole request and of the targets


def real_sizes(name: str) -> Sizes:
    """Sizes of a preset, as the targets are stated."""
    config, many = preset(name), (1, 100, 500, 2000)
    history = config.max_history
    return Sizes(config=config, history=history, prefill=1190, before=1100, new=8, candidates=many, request=100)


def rehearsal_sizes(name: str) -> Sizes:
    """Small enough for the interpreter, under the name of the preset."""
    config = dataclasses.replace(preset(SMALL), name=name)
    return Sizes(config=config, history=70, prefill=70, before=66, new=2, candidates=(1, 3), request=3)


@dataclass(kw_only=True)
class Context:
    """The context of one run of a suite."""

    work: Path  # folder for bundles and graphs, outside the repository
    source: str = "source"  # names the state of the source, so that a kept work folder holds nothing stale
    progress: Callable[[str], None] = field(default=lambda line: None)  # takes a line for the reader
    left: Callable[[], float] = field(default=lambda: float("inf"))  # seconds that are left
    threads: int = 2  # of every CPU engine
    quick: bool = False  # few samples
    device: str = "cpu"  # where torch computes: `cpu` or `cuda`
    rehearse: bool = False  # GPU measures at tiny sizes on the CPU, nothing compiled
    rates: Rates | None = None  # the GPU's; None until measured
    programs: dict[tuple[str, str], Any] = field(default_factory=dict)  # captured, by model and dtype
    artefacts: Path | None = None  # where compiled kernels are kept

    def rounds(self, full: int) -> int:
        """Rounds to measure."""
        return 5 if self.quick else full

    def sizes(self, model: str) -> Sizes:
        """What is measured of a model on a GPU."""
        return rehearsal_sizes(model) if self.rehearse else real_sizes(model)

    @functools.cached_property
    def timer(self) -> Timer:
        """The device's timer."""
        from onetrans.bench.timing import CudaTimer, HostTimer

        return CudaTimer() if self.device == "cuda" else HostTimer()

    @functools.cached_property
    def machine(self) -> Rates:
        """The CPU's rates, measured once."""
        from onetrans.bench.floor import measure_cpu

        self.progress("measuring the machine's rates")
        return measure_cpu(self.threads)

    @property
    def limits(self) -> Rates:
        """The GPU's rates."""
        if self.rates is None:
            raise JobError("the device's ceilings are not in the record; measure `ceilings` first")
        return self.rates

    def compile(self, function: Any, *, mode: str | None = None, dynamic: bool = False) -> Any:
        """torch.compile; in a rehearsal traced, and run without generated code."""
        import torch

        backend = {"backend": "aot_eager"} if self.rehearse else {"mode": mode}
        return torch.compile(function, dynamic=dynamic, fullgraph=True, **backend)

    def path(self, name: str) -> Path:
        """A path in the work folder for this state of the source."""
        folder = self.work / self.source
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def bundle(self, model: str) -> Path:
        """The preset's bundle with random weights, exported when first needed."""
        path = self.path(model)
        if not path.exists():
            self.progress(f"exporting {model}")
            self.export(model, path)
        return path

    def export(self, model: str, output: Path) -> tuple[float, int]:
        """Exports with the command a user would type, in a process of its own; wall seconds and most resident bytes."""
        options = ("--preset", model, "--random-weights", "--seed", str(SEED), "--output", str(output))
        return measure_process([sys.executable, "-m", "onetrans.cli.main", "export", *options], ROOT, environment())

    def ranker(self, model: str, *, threads: int | None = None, states: int = 0) -> Ranker:
        """The preset's bundle opened; with memory for so many users' states where any are to be kept."""
        path, options = self.bundle(model), BackendOptions(threads=threads or self.threads)
        ranker = Ranker.open(path, options=options)
        if not states:
            return ranker
        memory = states * ranker.bundle.manifest.bytes_per_user
        return Ranker.open(path, options=options, cache=CacheConfig(state_memory=memory))

    def verified(self, ranker: Ranker) -> list[CaseResult]:
        """How far a bundle's scores are from the reference; no speed comes from one that is too far."""
        results = verify(ranker.backend, read_cases(ranker.bundle))
        check(results)
        return results

    def module(self, name: str, arguments: Sequence[str], text: str) -> Any:
        """Runs a module in a process of its own with a text as its input, and gives the JSON that it prints."""
        command = [sys.executable, "-m", name, *arguments]
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, cwd=ROOT, env=environment(), check=False
        )
        if done.returncode:
            raise JobError(f"{name} failed: {last_line(done.stderr)}")
        return json.loads(done.stdout)

    def server(self, name: str, arguments: Sequence[str]) -> AbstractContextManager[Callable[[str], str]]:
        """A module in a process of its own that answers each line with a line: the function that asks it."""
        return answering([sys.executable, "-m", name, *arguments], ROOT, environment())


def environment() -> dict[str, str]:
    """The variables for a subprocess, so that it finds this checkout's packages wherever it runs."""
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def measure_key(suite: Suite, options: Options, measure: Measure) -> dict[str, Any]:
    """What must be equal for a held measure to stand; the table of tuned launch configurations is no part of it."""
    source = ROOT / "src" / "onetrans"
    paths = {path for path in source.rglob("*.py") if path.relative_to(source).parts[0] not in ("cli", "sizing")}
    file = importlib.import_module(measure.module).__file__
    assert file is not None
    paths.add(Path(file))
    if suite.needs[:1] == (measure.name,):
        paths |= {*(ROOT / "parity_tests").glob("test_triton_*.py"), ROOT / "parity_tests" / "triton_device.py"}
    return {
        "source_sha256": files_hash(ROOT, paths),
        "quick": options.quick,
        "threads": None if suite.gpu else options.threads,
        "device": (gpu_state().get("name") or "rehearsal") if suite.gpu else cpu_model(),
        "libraries": libraries(),
    }
