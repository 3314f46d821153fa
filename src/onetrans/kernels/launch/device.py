"""The device that tensors lie on, in the terms of a launch."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from onetrans.kernels.launch.config import Device


def device_of(where: torch.device) -> Device:
    """The CUDA device; for CPU tensors, as the interpreter has them, the one that `standing_in` names."""
    return _cuda(where) if where.type == "cuda" else _stand_in.get()


@contextmanager
def standing_in(device: Device) -> Iterator[None]:
    """Within, CPU tensors pass for tensors on that device when a configuration is chosen."""
    token = _stand_in.set(device)
    try:
        yield
    finally:
        _stand_in.reset(token)


_HOPPER = Device(capability=90)
_stand_in: ContextVar[Device] = ContextVar("stand_in", default=_HOPPER)


@functools.cache
def _cuda(where: torch.device) -> Device:
    major, minor = torch.cuda.get_device_capability(where)
    return Device(capability=10 * major + minor, name=torch.cuda.get_device_name(where))


@functools.cache
def multiprocessors(where: torch.device) -> int:
    """Programs that a device runs at once, one each."""
    return torch.cuda.get_device_properties(where).multi_processor_count if where.type == "cuda" else 132
