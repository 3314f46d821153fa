"""How kernels are launched: tiles by analysis or from a committed tuned table, never tuned while serving."""

from onetrans.kernels.launch.config import Device, LaunchConfig, Problem
from onetrans.kernels.launch.table import choose

__all__ = ["Device", "LaunchConfig", "Problem", "choose"]
