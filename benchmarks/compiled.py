"""What the compiler makes of every kernel that serving launches: `python -m benchmarks.compiled`. It needs no GPU.

The variants are found by running each model's lowered graphs with the launches caught, as on a device of each
architecture. Each is compiled to PTX and cubin, and must spill no register, fit the shared memory, ask for no scratch
and use the matrix instructions of its architecture.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
import triton

from benchmarks.context import ROOT
from onetrans.bench.environment import source
from onetrans.bench.record import write_json
from onetrans.errors import OneTransError
from onetrans.export.config import ExportConfig
from onetrans.export.inputs import capture_model, random_inputs
from onetrans.export.passes.keep_rows import keep_rows
from onetrans.export.program import Program
from onetrans.export.split import extract, split
from onetrans.export.targets.triton.target import lower
from onetrans.kernels.ahead.compile import ARCHITECTURES, Compiled, Variant, compile_variant
from onetrans.kernels.ahead.record import variants_for
from onetrans.kernels.jit import interpreted
from onetrans.kernels.launch.config import Device
from onetrans.kernels.launch.table import problem, tuned_devices
from onetrans.kernels.mixed_ffn import configs as ffn_configs
from onetrans.kernels.mixed_ffn import kernel as ffn
from onetrans.model.config import ModelConfig
from onetrans.model.onetrans import OneTrans
from onetrans.model.presets import preset

RECORD = ROOT / "benchmarks" / "results" / "compiled.json"
VOCABULARY = 64  # embedding tables do not matter to a kernel
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def models() -> dict[str, ModelConfig]:
    """The presets, which have head dimensions 32, 64 and 96, and one of 128."""
    small = preset("onetrans-s")
    wide = dataclasses.replace(small, name="heads-of-128", heads=2, layers=2, schedule="linear")
    return {config.name: _shrunk(config) for config in (preset("tiny"), small, preset("onetrans-l"), wide)}


def _shrunk(config: ModelConfig) -> ModelConfig:
    parts = {
        part: tuple(
            dataclasses.replace(feature, vocab=min(feature.vocab, VOCABULARY)) if feature.vocab else feature
            for feature in getattr(config.schema, part)
        )
        for part in ("event", "user", "candidate")
    }
    return dataclasses.replace(config, schema=dataclasses.replace(config.schema, **parts))


def programs(config: ModelConfig, dtype: torch.dtype) -> dict[str, Program]:
    """A model's prefill, append and decode over the kernels; its weights are random."""
    torch.manual_seed(0)
    whole, append = capture_model(OneTrans(config).eval().to(dtype), ExportConfig())
    parts = split(whole)
    lowered = {"prefill": lower(parts.prefill), "decode": lower(parts.decode)}
    if append is not None:
        lowered["append"] = lower(keep_rows(extract(append, parts.prefill.outputs))[0])
    return lowered


def launched(
    config: ModelConfig,
    lowered: dict[str, Program],
    dtype: torch.dtype,
    device: Device,
    sizes: Sequence[tuple[int, int, int]] = ((1, 1, 200), (1, 2000, 200)),
) -> list[Variant]:
    """Every distinct variant that requests of the given sizes (users, candidates, events) launch on a device."""
    with variants_for(device) as found, torch.inference_mode():
        for U, C, L in sizes:
            inputs: dict[str, Any] = random_inputs(config, {"U": U, "C": C, "L": L}, seed=0)
            inputs["slots"] = torch.arange(U)
            for layer, window in enumerate(config.pyramid.capacities[: config.layers]):
                for kind in "kv":
                    inputs[f"{kind}_state{layer}"] = torch.empty(U, window, config.heads, config.head_dim, dtype=dtype)
            for name in ("prefill", "append", "decode"):
                if name in lowered:
                    program = lowered[name]
                    made = program.module(*(inputs[spec.name] for spec in program.inputs))
                    inputs |= dict(zip(program.outputs, made, strict=True))
    return list(found.values())


def fused(config: ModelConfig, dtype: torch.dtype, device: Device) -> list[Variant]:
    """The feed-forwards in one kernel, which no default chooses but tuning may."""
    D, F = config.d, config.ffn_ratio * config.d
    with variants_for(device) as found:
        for P in (1, config.l_ns):
            x, w1, w2 = (torch.empty(P, *shape, dtype=dtype) for shape in ((64, D), (D, F), (F, D)))
            what = problem("mixed_ffn", str(dtype).removeprefix("torch."), 64, D=D, F=F, P=P, gated=0)
            tiles = ffn_configs.fused(what, device)
            gain = torch.empty(D, dtype=dtype)
            ffn.launch(torch.empty_like(x), x, w1, w2, gain, config.eps, config.activation, False, config=tiles)
    return list(found.values())


def compiled(
    names: Sequence[str], dtypes: Sequence[str], architectures: Sequence[int]
) -> Iterator[tuple[str, Variant, Compiled, dict[str, str | bytes]]]:
    """Compiles everything; yields each model's name, variant, report and artefacts."""
    known = models()
    for name in names:
        for dtype in dtypes:
            lowered = programs(known[name], DTYPES[dtype])
            for capability in architectures:
                plain = Device(capability=capability)
                variants = fused(known[name], DTYPES[dtype], plain)
                for device in (plain, *(tuned for tuned in tuned_devices() if tuned.capability == capability)):
                    for variant in launched(known[name], lowered, DTYPES[dtype], device):
                        if variant not in variants:
                            variants.append(variant)
                for variant in variants:
                    report, artefacts = compile_variant(variant, capability)
                    yield name, variant, report, artefacts


@click.command()
@click.option("--model", "names", multiple=True, help="Only this model; may be repeated.  [default: all]")
@click.option("--dtype", "dtypes", type=click.Choice(list(DTYPES)), multiple=True, help="Only this; may be repeated.")
@click.option(
    "--arch", "architectures", type=click.Choice([str(a) for a in ARCHITECTURES]), multiple=True, help="Likewise."
)
@click.option("--artefacts", type=click.Path(path_type=Path), help="Keep each variant's PTX and cubin here.")
@click.option("--record", type=click.Path(path_type=Path), help="Write the report here.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def main(
    names: tuple[str, ...],
    dtypes: tuple[str, ...],
    architectures: tuple[str, ...],
    artefacts: Path | None,
    record: Path | None,
    as_json: bool,
) -> None:
    """Compiles every kernel in every configuration that serving uses, and checks what came out."""
    if interpreted():
        raise click.UsageError("TRITON_INTERPRET is set, so that kernels are interpreted; unset it to compile them")
    unknown = set(names) - set(models())
    if unknown:
        raise click.UsageError(f"unknown model {', '.join(sorted(unknown))}; allowed: {', '.join(models())}")
    rows, faults = [], []
    wanted = [int(a) for a in architectures] or list(ARCHITECTURES)
    for name, variant, report, made in compiled(names or list(models()), dtypes or list(DTYPES), wanted):
        faults += [f"{name}: {fault}" for fault in report.faults(variant.products)]
        rows.append({"model": name, **dataclasses.asdict(report), "tiles": dataclasses.asdict(variant.config)})
        click.echo(
            f"{name} sm_{report.capability} {report.name}: {report.registers} registers, {report.spilled} B spilled, "
            f"{report.shared} B shared, {_matrices(report)}",
            err=True,
        )
        if artefacts is not None:
            _keep(artefacts, report, variant, made)
    body = {"source": source(), "triton": triton.__version__, "variants": rows, "faults": faults}
    if record is not None:
        write_json(record, body)
    if as_json:
        click.echo(json.dumps(body))
    for fault in faults:
        click.echo(fault, err=True)
    click.echo(f"{len(rows)} variants compiled, {len(faults)} faults", err=True)
    sys.exit(1 if faults else 0)


def _matrices(report: Compiled) -> str:
    return ", ".join(f"{count} {name}" for name, count in report.matrix.items() if count) or "no matrices"


def _keep(folder: Path, report: Compiled, variant: Variant, made: dict[str, str | bytes]) -> None:
    """PTX, cubin and how to launch them: arguments in order, pointers and int32, warps and shared memory."""
    digest = hashlib.sha256(repr((report.name, sorted(variant.signature), variant.config)).encode()).hexdigest()[:12]
    place = folder / f"sm_{report.capability}" / f"{report.entry}-{digest}"
    place.parent.mkdir(parents=True, exist_ok=True)
    ptx, cubin = made["ptx"], made["cubin"]
    assert isinstance(ptx, str)
    assert isinstance(cubin, bytes)
    place.with_suffix(".ptx").write_text(ptx, encoding="utf-8")
    place.with_suffix(".cubin").write_bytes(cubin)
    write_json(place.with_suffix(".json"), {**dataclasses.asdict(report), "arguments": variant.signature})


if __name__ == "__main__":
    try:
        main()
    except OneTransError as error:
        sys.exit(str(error))
