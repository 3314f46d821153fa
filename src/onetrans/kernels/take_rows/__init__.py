"""take_rows: the rows of a window that go on querying."""

from onetrans.kernels.take_rows.op import take_rows, take_rows_op, take_rows_reference

__all__ = ["take_rows", "take_rows_op", "take_rows_reference"]
