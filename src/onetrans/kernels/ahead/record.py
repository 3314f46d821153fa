"""What a program launches, as variants to compile: found by running it with the launches caught."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from onetrans.kernels.ahead.compile import Variant
from onetrans.kernels.jit import caught
from onetrans.kernels.launch.config import Device, LaunchConfig
from onetrans.kernels.launch.device import standing_in

TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
}
WITHOUT_PRODUCTS = {"candidate_fold", "queried_rows"}
TILES = {"WIDE", "BLOCK_M", "BLOCK_N", "BLOCK_K", "STEPS_K", "GROUP", "PAD", "SPLIT"}


@contextmanager
def variants_for(device: Device) -> Iterator[dict[tuple[Any, ...], Variant]]:
    """Collects every distinct variant that would be launched on CPU tensors if they lay on `device`.

    Nothing is computed: what kernels would write stays as it was allocated.
    """
    found: dict[tuple[Any, ...], Variant] = {}

    def catch(kernel: Any, given: dict[str, Any]) -> None:
        variant = _variant(kernel, given)
        identity = (kernel.__name__, *sorted(variant.signature.items()), *sorted(map(repr, variant.constants.items())))
        found.setdefault((*identity, variant.config), variant)

    with caught(catch), standing_in(device):
        yield found


def _variant(kernel: Any, given: dict[str, Any]) -> Variant:
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for parameter in kernel.params:
        value = given[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        elif parameter.is_constexpr or value is None:
            constants[parameter.name] = value
        else:
            signature[parameter.name] = "i32"
    config = LaunchConfig(
        block_m=constants["BLOCK_M"],
        block_n=constants.get("BLOCK_N", 0),
        block_k=constants.get("BLOCK_K", 0),
        split=constants.get("SPLIT", 0),
        warps=given["num_warps"],
        stages=given.get("num_stages", 3),
    )
    told = [f"{k}={v}" for k, v in constants.items() if k not in TILES and v is not None and v is not False]
    dtype = next(kind for kind in signature.values() if kind in ("*fp16", "*bf16"))
    stem = kernel.__name__.removesuffix("_kernel")
    return Variant(
        name=f"{stem} {dtype[1:]} {' '.join(told)}",
        kernel=kernel,
        signature=signature,
        constants=constants,
        config=config,
        products=stem not in WITHOUT_PRODUCTS,
    )
