"""take_rows in Triton: one launch, where plain index arithmetic takes six."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from onetrans.kernels.jit import launcher

BLOCK_M = 16


@triton.jit(do_not_specialize=("N", "rows"), do_not_specialize_on_alignment=("start",))
def queried_rows_kernel(x, start, N, rows, out, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr):
    """Row i of user u is row min(start[u] + i, N - 1) of x [U, N, D]; all are contiguous.

    Records of compiled kernels know it by this name.
    """
    user = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Masked rows read nothing, so `source` need only be right where row < rows. N and rows change with the request and
    # are not specialised on; WIDTH is D's next power of two, since tiles are.
    source = tl.minimum(tl.load(start + user).to(tl.int32) + row, N - 1)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    taken = tl.load(x + (user * N + source)[:, None] * D + column[None, :], mask=inside)
    tl.store(out + (user * rows + row)[:, None] * D + column[None, :], taken, mask=inside)


@torch.library.triton_op("onetrans_triton::take_rows", mutates_args=())
def take_rows_triton(x: torch.Tensor, start: torch.Tensor, rows: int) -> torch.Tensor:
    """The kernel as an op that captures see into; see `take_rows_reference`."""
    U, N, D = x.shape
    out = x.new_empty((U, rows, D))
    launcher(queried_rows_kernel)[(triton.cdiv(rows, BLOCK_M), U)](
        x.contiguous(),
        start.contiguous(),
        N,
        rows,
        out,
        D=D,
        WIDTH=triton.next_power_of_2(D),
        BLOCK_M=BLOCK_M,
        num_warps=4,
    )
    return out
