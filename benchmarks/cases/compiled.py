"""What the compiler makes of every kernel that serving launches; it needs no GPU.

The variants are found by running each model's lowered graphs with the launches caught, as on a device of each
architecture. Each is compiled to PTX and cubin, and must spill no register, fit the shared memory, ask for no scratch
and use the matrix instructions of its architecture.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants.kernels import ACTIVATION, EPS
from benchmarks.contestants.programs import KINDS, lower_to_kernels, programs_of, slab_name
from benchmarks.context import SEED, Context
from onetrans.bench.record import write_json
from onetrans.bench.suite import Outcome
from onetrans.export.execute import by_name
from onetrans.export.models.base import ModelAdapter
from onetrans.export.program import Program
from onetrans.kernels.ahead.compile import Compiled, Variant, compile_variant
from onetrans.kernels.ahead.record import variants_for
from onetrans.kernels.launch.config import Device
from onetrans.kernels.launch.table import problem, tuned_devices
from onetrans.kernels.mixed_ffn import configs as ffn_configs
from onetrans.kernels.mixed_ffn import kernel as ffn
from onetrans.model.config import ModelConfig
from onetrans.model.onetrans import OneTrans
from onetrans.model.presets import preset
from onetrans.precision import of_torch, precision
from onetrans.spec import TensorSpec

VOCABULARY = 64  # embedding tables do not matter to a kernel
WIDE = "heads-of-128"
SIZES = ((1, 1, 200), (1, 2000, 200))


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A model's programs over the kernels, in one dtype, with random weights."""

    config: ModelConfig
    dtype: torch.dtype
    adapter: ModelAdapter
    windows: Sequence[TensorSpec]
    programs: Mapping[str, Program]


def config_of(name: str) -> ModelConfig:
    """A preset with small vocabularies; the presets have head dimensions 32, 64 and 96, and `heads-of-128` one more."""
    config = preset("onetrans-s" if name == WIDE else name)
    if name == WIDE:
        config = dataclasses.replace(config, name=WIDE, heads=2, layers=2, schedule="linear")

    def shrunk(feature: Any) -> Any:
        return dataclasses.replace(feature, vocab=min(feature.vocab, VOCABULARY)) if feature.vocab else feature

    parts = {part: tuple(map(shrunk, getattr(config.schema, part))) for part in ("event", "user", "candidate")}
    return dataclasses.replace(config, schema=dataclasses.replace(config.schema, **parts))


def lowered_model(name: str, dtype: torch.dtype) -> Lowered:
    """A model's prefill, append and decode over the kernels."""
    torch.manual_seed(SEED)
    config = config_of(name)
    adapter, made = programs_of(OneTrans(config).eval().to(dtype))
    windows = [spec for spec in made.by_name["prefill"].outputs if spec.is_window]
    return Lowered(config, dtype, adapter, windows, lower_to_kernels(made.by_name))


def launched(model: Lowered, device: Device, sizes: Sequence[tuple[int, int, int]] = SIZES) -> list[Variant]:
    """Every distinct variant that requests of the given sizes (users, candidates, events) launch on a device."""
    with variants_for(device) as found, torch.inference_mode():
        for U, C, L in sizes:
            inputs = model.adapter.example_inputs(SEED, {"U": U, "C": C, "L": L})
            inputs["slots"] = torch.arange(U)
            for spec in model.windows:
                inputs[slab_name(spec)] = torch.empty(U, *spec.shape_per_user, dtype=model.dtype)
            for kind in KINDS:
                if kind in model.programs:
                    program = model.programs[kind]
                    made = program.module(*(inputs[spec.name] for spec in program.inputs))
                    inputs |= by_name(program, made)
    return list(found.values())


def fused(model: Lowered, device: Device) -> list[Variant]:
    """The feed-forwards in one kernel, which no default chooses but tuning may."""
    config, dtype = model.config, model.dtype
    D, F = config.d, config.ffn_ratio * config.d
    with variants_for(device) as found:
        for P in (1, config.l_ns):
            x, w1, w2 = (torch.empty(P, *shape, dtype=dtype) for shape in ((64, D), (D, F), (F, D)))
            of_ffn = problem("mixed_ffn", of_torch(dtype).name, 64, D=D, F=F, P=P, gated=0)
            tiles, gain = ffn_configs.fused(of_ffn, device), torch.empty(D, dtype=dtype)
            ffn.launch(torch.empty_like(x), x, w1, w2, gain, EPS, ACTIVATION, False, config=tiles)
    return list(found.values())


def compile_model(context: Context, model: str, dtype: str, capability: int) -> Outcome:
    """Compiles every kernel of a model in every configuration that serving uses, and checks what came out."""
    if (model, dtype) not in context.programs:
        context.programs.clear()
        context.programs[model, dtype] = lowered_model(model, precision(dtype).torch)
    lowered, plain = context.programs[model, dtype], Device(capability=capability)
    variants, outcome, faults = fused(lowered, plain), Outcome(), []
    for device in (plain, *(tuned for tuned in tuned_devices() if tuned.capability == capability)):
        variants += [variant for variant in launched(lowered, device) if variant not in variants]
    for variant in variants:
        report, artefacts = compile_variant(variant, capability)
        faults += report.faults(variant.products)
        outcome.figures.append({**dataclasses.asdict(report), "tiles": vars(variant.config)})
        matrices = ", ".join(f"{count} {name}" for name, count in report.matrix.items() if count) or "no matrices"
        context.progress(
            f"sm_{capability} {report.name}: {report.registers} registers, {report.spilled} B spilled, "
            f"{report.shared} B shared, {matrices}"
        )
        if context.artefacts is not None:
            _keep(context.artefacts, report, variant, artefacts)
    name = f"{model}, {dtype}, sm_{capability}"
    outcome.figure(f"{name}: variants compiled", len(variants))
    outcome.figure(f"{name}: most registers of a thread", max(figure["registers"] for figure in outcome.figures))
    outcome.figure(f"{name}: faults", len(faults), target=0)
    outcome.failed = "; ".join(faults)
    return outcome


def _keep(folder: Path, report: Compiled, variant: Variant, made: Mapping[str, str | bytes]) -> None:
    """PTX, cubin and how to launch them: arguments in order, pointers and int32, warps and shared memory."""
    digest = hashlib.sha256(repr((report.name, sorted(variant.signature), variant.config)).encode()).hexdigest()[:12]
    path = folder / f"sm_{report.capability}" / f"{report.entry}-{digest}"
    path.parent.mkdir(parents=True, exist_ok=True)
    for kind, content in made.items():
        path.with_suffix(f".{kind}").write_bytes(content.encode() if isinstance(content, str) else content)
    write_json(path.with_suffix(".json"), {**dataclasses.asdict(report), "arguments": variant.signature})
