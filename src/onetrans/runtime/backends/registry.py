"""Which backend runs which target; chosen once, when a bundle is opened."""

from __future__ import annotations

from collections.abc import Callable

from onetrans.errors import BundleError
from onetrans.runtime.backends.base import Backend
from onetrans.runtime.bundle import Bundle


def _onnx(bundle: Bundle, threads: int | None) -> Backend:
    from onetrans.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu

    return OnnxRuntimeCpu(bundle, threads=threads)


BACKENDS: dict[str, Callable[[Bundle, int | None], Backend]] = {"onnx": _onnx}


def open_backend(bundle: Bundle, *, threads: int | None = None) -> Backend:
    """Loads a bundle into the backend of its target.

    Raises:
        BundleError: No backend runs the target.
        MissingDependencyError: The backend's package is not installed.
    """
    target = bundle.manifest.target
    if target not in BACKENDS:
        raise BundleError(f"{bundle.path} was made for target {target!r}; this release runs {', '.join(BACKENDS)}")
    return BACKENDS[target](bundle, threads)
