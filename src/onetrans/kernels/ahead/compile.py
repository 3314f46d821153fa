"""Compiles a variant of a kernel to PTX and cubin for an architecture that need not be at hand."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from onetrans.kernels.jit import interpreted
from onetrans.kernels.launch.config import SHARED_BYTES, LaunchConfig

ARCHITECTURES = (80, 90, 100)
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}  # the instruction that each generation is fast by


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One compiled form of a kernel.

    Attributes:
        name: The op's name and what sets this variant apart.
        kernel: The `triton.jit` function.
        signature: Types of the run-time arguments, in order: pointers and int32.
        constants: Values of the compile-time arguments.
        config: Warps and stages.
        products: Whether it multiplies matrices.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    config: LaunchConfig
    products: bool = True


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What became of a variant.

    Attributes:
        name: The variant's.
        capability: Compute capability it was compiled for.
        registers: Registers of a thread.
        spilled: Bytes of registers stored to local memory.
        shared: Bytes of shared memory of a program.
        matrix: Occurrences of each matrix instruction.
        scratch: Bytes of global scratch that a launcher would have to bring.
        entry: Name of the kernel's entry point.
        warps: Warps of a program.
    """

    name: str
    capability: int
    registers: int
    spilled: int
    shared: int
    matrix: dict[str, int]
    scratch: int
    entry: str
    warps: int

    def faults(self, products: bool = True) -> list[str]:
        """What an engine or a user would trip over; empty where all is well."""
        limit = SHARED_BYTES[self.capability]
        wanted = MATRIX[self.capability]
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes of registers")
        if self.shared > limit:
            found.append(f"needs {self.shared} bytes of shared memory; the limit is {limit}")
        if self.scratch:
            found.append(f"needs {self.scratch} bytes of global scratch")
        if products and not self.matrix[wanted]:
            found.append(f"has no {wanted}")
        return [f"{self.name} for sm_{self.capability}: {fault}" for fault in found]


def compile_variant(variant: Variant, capability: int) -> tuple[Compiled, dict[str, str | bytes]]:
    """Compiles one variant; returns the report and the artefacts `ptx` (text) and `cubin` (bytes).

    Raises:
        RuntimeError: Kernels are interpreted (`TRITON_INTERPRET=1`), so that there is nothing to compile.
    """
    if interpreted():
        raise RuntimeError("kernels are interpreted; unset TRITON_INTERPRET to compile them")
    names = variant.kernel.arg_names
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    given = {name for name, kind in signature.items() if kind == "constexpr"}
    if given != set(variant.constants) or set(variant.signature) - set(names):
        raise ValueError(f"{variant.name}: arguments {sorted(given ^ set(variant.constants))} are not both ways")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") and not variant.kernel.params[i].do_not_specialize_on_alignment
    }
    source = ASTSource(variant.kernel, signature, variant.constants, aligned)
    made = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": variant.config.warps, "num_stages": variant.config.stages},
    )
    ptx = made.asm["ptx"]
    registers, spilled = _resources(ptx, capability)
    metadata = made.metadata
    report = Compiled(
        name=variant.name,
        capability=capability,
        registers=registers,
        spilled=spilled,
        shared=metadata.shared,
        matrix={name: ptx.count(name) for name in MATRIX.values()},
        scratch=metadata.global_scratch_size + metadata.profile_scratch_size,
        entry=metadata.name,
        warps=metadata.num_warps,
    )
    return report, {"ptx": ptx, "cubin": made.asm["cubin"]}


def _resources(ptx: str, capability: int) -> tuple[int, int]:
    """Registers of a thread and bytes spilled, as the assembler reports them."""
    target = re.search(r"\.target\s+(sm_\w+)", ptx)
    assert target
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx, encoding="utf-8")
        done = subprocess.run(
            [
                get_ptxas(capability).path,
                "-v",
                f"--gpu-name={target[1]}",
                str(source),
                "-o",
                str(Path(folder, "cubin")),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.search(r"(\d+) bytes spill stores", done.stderr)
    assert registers
    return int(registers[1]), int(spills[1]) if spills else 0
