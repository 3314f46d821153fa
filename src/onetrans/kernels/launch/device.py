"""The device that tensors lie on, in the terms of a launch."""

from __future__ import annotations

import functools

import torch

from onetrans.kernels.launch.config import Device

INTERPRETED = Device(capability=90)


@functools.cache
def device_of(where: torch.device) -> Device:
    """The CUDA device, or for the interpreter's CPU tensors a stand-in of compute capability 9.0."""
    if where.type != "cuda":
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(where)
    return Device(capability=10 * major + minor, name=torch.cuda.get_device_name(where))


@functools.cache
def multiprocessors(where: torch.device) -> int:
    """Programs that a device runs at once, one each."""
    return torch.cuda.get_device_properties(where).multi_processor_count if where.type == "cuda" else 132
