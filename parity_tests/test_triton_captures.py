"""What torch.export and compilers see of the kernels: not interpreted ones, so in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]


def run(script):
    """The lines that a script prints where kernels are not interpreted and `benchmarks` is found."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONSAFEPATH")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


CAPTURE = """
import torch
from torch._dynamo.backends.common import aot_autograd
import onetrans.kernels.candidate_attention.kernel, onetrans.kernels.history_attention.kernel
import onetrans.kernels.mixed_ffn.kernel, onetrans.kernels.mixed_linear.kernel

ops = torch.ops.onetrans_triton
class Layer(torch.nn.Module):
    def forward(self, q, s, n, rows, w, w1, w2, gain):
        seen = ops.history_attention(q, q, q, s, n)
        own = ops.candidate_attention(rows, rows, rows, [q], [q], [n])
        own = ops.mixed_linear(own, w, gain)
        return seen, ops.mixed_ffn(own, w1, w2, gain, 1e-6, "gelu", False)

def half(*shape):
    return torch.randn(shape, dtype=torch.bfloat16)

rows = [half(2, 70, 2, 64), torch.zeros(2, dtype=torch.int64), torch.full((2,), 70), half(4, 6, 128)]
inputs = (*rows, half(4, 128, 128), half(4, 128, 256), half(4, 256, 128), half(128))
exported = torch.export.export(Layer(), inputs, strict=False)
print("exported", sorted(str(n.target) for n in exported.graph.nodes if "onetrans" in str(n.target)))

class Seen(Exception):
    pass

def record(module, inputs):
    kernels = [n for n in module.graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    print("kernels", len(kernels))
    raise Seen

try:
    torch.compile(Layer(), backend=aot_autograd(fw_compiler=record), fullgraph=True)(*inputs)
except Exception as error:
    assert "Seen" in repr(error) or isinstance(error.__cause__, Seen) or "Seen" in str(error), error
"""


def test_captures_see_the_kernels():
    """torch.export keeps the ops; what compiles further (AOTInductor) finds the kernels inside them."""
    ops = ("candidate_attention", "history_attention", "mixed_ffn", "mixed_linear")
    lines = run(CAPTURE)
    assert lines[0] == f"exported {[f'onetrans_triton.{op}.default' for op in ops]}"
    assert lines[1] == "kernels 5", "one of each attention and linear, two of the feed-forward"


WHOLE_PROGRAM = """
import torch
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from onetrans.export.execute import on_device as place
from onetrans.export.targets.triton import lower_program
from onetrans.model.onetrans import OneTrans
from parity_tests.configs import programs_of, small_config

class Device:  # enough of a driver for torch to find out what kernels write
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

driver.set_active(Device())

class Seen(Exception):
    pass

def record(module, inputs):
    kernels = [node for node in module.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    print("writes", *sorted({name for node in kernels for name in node.kwargs["tensors_to_clone"]}))
    raise Seen(f"<{len(kernels)}>")

config = small_config(max_history=600, explicit_keep=(600, 24, 6))  # long enough for splits of a program each
for program in programs_of(OneTrans(config).to(torch.bfloat16)).by_name.values():
    lowered = place(lower_program(program), torch.device("cpu"), {})
    sizes = {"U": 1, "C": 7, "L": 9, "S": 3} | {f"W{i}": bound for i, bound in enumerate(config.pyramid.capacities)}
    shapes = [[sizes.get(d, 64) if isinstance(d, str) else d for d in spec.dims] for spec in lowered.inputs]
    inputs = [torch.zeros(n, dtype=getattr(torch, spec.dtype)) for n, spec in zip(shapes, lowered.inputs)]
    compiled = torch.compile(lowered.module, backend=aot_autograd(fw_compiler=record), fullgraph=True, dynamic=False)
    try:
        compiled(*inputs)
    except Exception as error:
        wanted = 0
        for node in lowered.module.graph.nodes:
            op = str(node.target).removeprefix("onetrans_triton.").removesuffix(".default")
            wanted += str(node.target).startswith("onetrans_triton.")
            splits = op == "candidate_attention" and sizes[f"W{str(node.args[3][-1])[-1]}"] > 256
            wanted += splits or op == "mixed_ffn"
        print("seen" if f"<{wanted}>" in str(error) else f"wanted {wanted}: {error}")
"""


@pytest.mark.slow
def test_a_compiler_sees_the_kernels_of_whole_programs_and_what_they_write():
    """An argument taken for written would be copied around every launch."""
    lines = run(WHOLE_PROGRAM)
    keys = "out v_state"
    assert lines == [f"writes {keys}", "seen", "writes out part part_m part_total", "seen", f"writes {keys}", "seen"]
