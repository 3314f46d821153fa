"""What only a GPU can show: which code an op runs there, and that its launches can be captured and replayed."""

from __future__ import annotations

import pytest
import torch

from parity_tests.triton_device import DEVICE, HALVES

triton = pytest.importorskip("triton")

from onetrans.kernels.candidate_attention import candidate_attention_op, candidate_attention_reference  # noqa: E402
from onetrans.kernels.candidate_attention.kernel import candidate_attention_triton  # noqa: E402
from onetrans.kernels.history_attention import history_attention_op, history_attention_reference  # noqa: E402
from onetrans.kernels.history_attention.kernel import history_attention_triton  # noqa: E402
from onetrans.kernels.mixed_ffn import mixed_ffn_op, mixed_ffn_reference  # noqa: E402
from onetrans.kernels.mixed_ffn.kernel import mixed_ffn_triton  # noqa: E402
from onetrans.kernels.mixed_linear import mixed_linear_op, mixed_linear_reference  # noqa: E402
from onetrans.kernels.mixed_linear.kernel import mixed_linear_triton  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")]


def arguments(dtype):
    """Each op's arguments, of two users and six candidates."""
    torch.manual_seed(0)

    def randn(*shape):
        return (torch.randn(shape) * shape[-1] ** -0.25).to(dtype).to(DEVICE)

    def ints(*values):
        return torch.tensor(values, dtype=torch.int64, device=DEVICE)

    q, k, v = (randn(2, 90, 2, 64) for _ in range(3))
    rows = [randn(4, 6, 128) for _ in range(3)]
    return {
        "history_attention": (q, k, v, ints(0, 0), ints(90, 33)),
        "candidate_attention": (*rows, [k], [v], [ints(90, 33)], None),
        "mixed_linear": (rows[0], randn(4, 128, 96), randn(128)),
        "mixed_ffn": (rows[0], randn(4, 128, 256), randn(4, 256, 128), randn(128), 1e-6, "gelu", False),
    }


OPS = {
    "history_attention": (history_attention_op, history_attention_triton, history_attention_reference),
    "candidate_attention": (candidate_attention_op, candidate_attention_triton, candidate_attention_reference),
    "mixed_linear": (mixed_linear_op, mixed_linear_triton, mixed_linear_reference),
    "mixed_ffn": (mixed_ffn_op, mixed_ffn_triton, mixed_ffn_reference),
}


@pytest.mark.parametrize("name", list(OPS))
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_an_op_runs_the_kernel_in_half_precision_and_the_reference_in_full(name, dtype):
    op, kernel, reference = OPS[name]
    given = arguments(dtype)[name]
    expected = (reference if dtype == torch.float32 else kernel)(*given)
    assert torch.equal(op(*given), expected)


@pytest.mark.parametrize("name", list(OPS))
def test_a_captured_launch_reads_its_inputs_anew_at_every_replay(name):
    kernel = OPS[name][1]
    given = arguments(torch.bfloat16)[name]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        kernel(*given)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(*given)
    for scale in (0.5, 2.0):
        given[0].mul_(scale)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, kernel(*given))
