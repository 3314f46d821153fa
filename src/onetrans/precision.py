"""The one table of dtypes: names, bytes, rounding, and how values lie in memory where numpy has no such type.

numpy has no bfloat16: such values are kept as their bit pattern in uint16. An array of uint16 is therefore read only
beside its spec, which says what the bits mean; `widen` and `narrow` are the only conversions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from onetrans.errors import ConfigError

if TYPE_CHECKING:
    import torch

DType = Literal["float64", "float32", "float16", "bfloat16", "int64", "bool"]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """One dtype.

    Attributes:
        name: As torch and the manifest call it: `bfloat16`.
        short: As the command line calls it: `bf16`; empty for what no model can be exported in.
        nbytes: Bytes of a value.
        ulp: Spacing of the numbers from 1 to 2; 0 where values are exact.
        stored: The numpy dtype that holds it: its own, or the unsigned integer of its bit pattern.
        safetensors: Its name in a safetensors header.
    """

    name: DType
    short: str
    nbytes: int
    ulp: float
    stored: str
    safetensors: str

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype of an array of such values."""
        return np.dtype(self.stored)

    @property
    def torch(self) -> torch.dtype:
        """The torch dtype."""
        import torch

        dtype: torch.dtype = getattr(torch, self.name)
        return dtype

    @property
    def is_float(self) -> bool:
        """Whether values are rounded."""
        return self.ulp > 0


TABLE: tuple[Precision, ...] = (
    Precision(name="float64", short="", nbytes=8, ulp=2.0**-52, stored="float64", safetensors="F64"),
    Precision(name="float32", short="fp32", nbytes=4, ulp=2.0**-23, stored="float32", safetensors="F32"),
    Precision(name="float16", short="fp16", nbytes=2, ulp=2.0**-10, stored="float16", safetensors="F16"),
    Precision(name="bfloat16", short="bf16", nbytes=2, ulp=2.0**-7, stored="uint16", safetensors="BF16"),
    Precision(name="int64", short="", nbytes=8, ulp=0.0, stored="int64", safetensors="I64"),
    Precision(name="bool", short="", nbytes=1, ulp=0.0, stored="bool", safetensors="BOOL"),
)
assert {row.name for row in TABLE} == set(get_args(DType))
BY_NAME = {row.name: row for row in TABLE}
BY_SHORT = {row.short: row for row in TABLE if row.short}
BY_SAFETENSORS = {row.safetensors: row for row in TABLE}


def precision(name: str) -> Precision:
    """The row of a dtype.

    Args:
        name: Either of its names: `bfloat16` or `bf16`.

    Raises:
        ConfigError: There is none of that name.
    """
    found = BY_SHORT.get(name) or next((row for row in TABLE if row.name == name), None)
    if found is None:
        raise ConfigError(f"unknown precision {name!r}; allowed: {', '.join(BY_SHORT)}")
    return found


def of_torch(dtype: torch.dtype) -> Precision:
    """The row of a torch dtype.

    Raises:
        ConfigError: The table has none.
    """
    name = str(dtype).removeprefix("torch.")
    found = next((row for row in TABLE if row.name == name), None)
    if found is None:
        raise ConfigError(f"dtype {name} is not one of {', '.join(row.name for row in TABLE)}")
    return found


def widen(values: NDArray[Any], dtype: DType) -> NDArray[Any]:
    """Stored values as numbers that numpy calculates with: bfloat16 as float32, every other dtype as it is."""
    if dtype != "bfloat16":
        return values
    return (values.astype(np.uint32) << 16).view(np.float32)


def narrow(values: NDArray[Any], dtype: DType) -> NDArray[Any]:
    """Numbers as stored values of a dtype, rounded to the nearest, ties to even; infinite where they are too large."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return values.astype(BY_NAME[dtype].numpy, copy=False)
    single = np.ascontiguousarray(values, dtype=np.float32)
    bits = single.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FC0), rounded)
