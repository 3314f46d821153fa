"""Tensors of a safetensors file as views of its bytes, so that the weights are in memory once for all graphs.

The library's own reader copies each tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onetrans.errors import BundleError
from onetrans.precision import BY_SAFETENSORS


def read_tensors(content: bytes, where: str) -> dict[str, NDArray[Any]]:
    """Tensors of a safetensors file, as views of its bytes; each in the numpy dtype that stores its own.

    Raises:
        BundleError: The header does not describe the file.
    """
    views: dict[str, NDArray[Any]] = {}
    try:
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            views[name] = _view(content, end, entry)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise BundleError(f"{where} is not a safetensors file that this release reads: {error}") from error
    return views


def _view(content: bytes, base: int, entry: Mapping[str, Any]) -> NDArray[Any]:
    dtype, shape = BY_SAFETENSORS[entry["dtype"]].numpy, tuple(entry["shape"])
    begin, stop = entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (begin, stop, *shape)):
        raise ValueError(f"a tensor has shape {shape} at bytes {begin} to {stop}")
    if stop - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"a tensor of {dtype} and shape {shape} has {stop - begin} bytes")
    return np.frombuffer(content, dtype, math.prod(shape), base + begin).reshape(shape)
