"""take_rows: the S-tokens of a layer's window that go on querying, as many of each user from where its own begin."""

from __future__ import annotations

import torch

from onetrans.kernels.define import define_op


def take_rows_reference(x: torch.Tensor, start: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows start[u] … start[u] + rows - 1 of each user; past the end the last row is repeated.

    Args:
        x: [U, N, D].
        start: The first row of each user [U], int64, from 0.
        rows: How many of each, from 0.

    Returns:
        [U, rows, D], copies of x's rows bit for bit.
    """
    U, N, D = x.shape
    index = (start[:, None] + torch.arange(rows, device=x.device)).clamp(max=N - 1)
    index = index + torch.arange(U, device=x.device)[:, None] * N
    taken: torch.Tensor = x.flatten(0, 1).index_select(0, index.flatten()).view(U, rows, D)
    return taken


take_rows_op, take_rows = define_op(
    "take_rows",
    take_rows_reference,
    fake=lambda x, _, rows: x.new_empty((x.shape[0], rows, x.shape[2])),
    kernel="onetrans.kernels.take_rows.kernel:take_rows_triton",
    autocast=False,  # it copies rows, so that the residual stream keeps its dtype
)
