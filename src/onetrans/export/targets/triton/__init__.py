"""The Triton kernels as a lowering: a graph of kernels that AOTInductor and CUDA graphs take, its state in slabs.

No bundle carries these programs yet, so there is nothing to write: targets that compile them build on `lower`.
"""

from __future__ import annotations

from collections.abc import Mapping

from onetrans.export.passes.base import Pass, run_passes
from onetrans.export.passes.dense_to_mixed_linear import DenseToMixedLinear
from onetrans.export.passes.queried_rows import QueriedRows
from onetrans.export.passes.state_in_slabs import StateInSlabs
from onetrans.export.passes.triton_kernels import TritonKernels
from onetrans.export.program import Program
from onetrans.export.targets.base import Artifact

PASSES: tuple[Pass, ...] = (DenseToMixedLinear(), QueriedRows(), StateInSlabs(), TritonKernels())


def lower(programs: Mapping[str, Program]) -> dict[str, Artifact[Program]]:
    """Lowers programs of `onetrans.export.programs`, in the dtype that they are to run in.

    Raises:
        ExportError: A program is not one that keeps its state in windows of keys and values.
    """
    return {name: _artifact(lower_program(program)) for name, program in programs.items()}


def lower_program(program: Program) -> Program:
    """Lowers one prefill, append or decode program; see `PASSES` for what becomes of it."""
    return run_passes(program, PASSES)[-1].program


def _artifact(program: Program) -> Artifact[Program]:
    return Artifact(value=program, inputs=program.inputs, outputs=program.outputs)
