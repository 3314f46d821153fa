"""The table of targets: what a graph can be lowered to, what that needs, and which backend runs it where.

Command-line choices, `doctor`, the exporter, the bundle reader and the environment record read this table and nothing
else. A target of another package is an entry point of group `onetrans.targets` whose value is a `Target`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from onetrans.errors import BundleError, ConfigError, unknown

if TYPE_CHECKING:
    from onetrans.runtime.backends.base import Backend, BackendOptions
    from onetrans.runtime.bundle import Bundle

Trust = Literal["data", "code"]
GROUP = "onetrans.targets"
PACKAGE = "onetrans-export"


@dataclass(frozen=True, kw_only=True)
class Target:
    """One target.

    Attributes:
        name: As `--target` and the manifest call it.
        precisions: What its graphs can run in, by short name; the first is the default.
        trust: `data`: its files are checked and cannot run code. `code`: its files are programs.
        lowering: Module that lowers programs to it: `onetrans.export.targets.base.Lowering`.
        backends: Device to the class that runs it there, `module:class`; the first device is the default.
        export_packages: Distributions that exporting needs; of those in one tuple any one will do.
        serve_packages: The same of serving.
        export_extra: Extra of this package that installs the former.
        serve_extra: Extra of this package that installs the latter.
        file_check: `module:function` that refuses a graph's file if it reaches outside its folder; empty for none.
    """

    name: str
    precisions: tuple[str, ...]
    trust: Trust
    lowering: str
    backends: Mapping[str, str]
    export_packages: tuple[tuple[str, ...], ...] = ()
    serve_packages: tuple[tuple[str, ...], ...] = ()
    export_extra: str = ""
    serve_extra: str = ""
    file_check: str = ""

    def __post_init__(self) -> None:
        if not self.precisions or not self.backends:
            raise ConfigError(f"target {self.name} states no precision or no backend; it needs one of each")

    @property
    def device(self) -> str:
        """The default device."""
        return next(iter(self.backends))

    def install_hint(self, extra: str) -> str:
        """What to type to install an extra."""
        return f'pip install "{PACKAGE}[{extra}]"' if extra else f"see the documentation of target {self.name}"


TORCH, ONNXRUNTIME = ("torch",), ("onnxruntime", "onnxruntime-gpu")
TABLE: tuple[Target, ...] = (
    Target(
        name="onnx",
        precisions=("fp32",),
        trust="data",
        lowering="onetrans.export.targets.onnx",
        backends={"cpu": "onetrans.runtime.backends.onnxruntime_cpu:OnnxRuntimeCpu"},
        export_packages=(TORCH, ("onnx",), ("onnxscript",), ONNXRUNTIME),
        serve_packages=(ONNXRUNTIME,),
        export_extra="cpu",
        serve_extra="serve",
        file_check="onetrans.runtime.backends.onnx_files:check_graph",
    ),
)


@functools.cache
def _plugins() -> Mapping[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}


def names() -> tuple[str, ...]:
    """Every target's name: those of this package, then those of others."""
    own = tuple(row.name for row in TABLE)
    return own + tuple(name for name in _plugins() if name not in own)


@functools.cache
def find(name: str) -> Target:
    """The target of that name.

    Raises:
        ConfigError: There is none, or another package's cannot be loaded.
    """
    own = next((row for row in TABLE if row.name == name), None)
    if own is not None:
        return own
    if name not in _plugins():
        raise ConfigError(unknown("target", name, names()))
    try:
        found = _plugins()[name].load()
    except Exception as error:
        raise ConfigError(f"target {name!r} of another package cannot be loaded: {error}") from error
    if not isinstance(found, Target) or found.name != name:
        raise ConfigError(f"entry point {name!r} of group {GROUP} is no Target of that name; mend its package")
    return found


def packages() -> tuple[str, ...]:
    """Distributions that any target of this package needs, each once."""
    needed = [name for row in TABLE for names in (*row.export_packages, *row.serve_packages) for name in names]
    return tuple(dict.fromkeys(needed))


def extra_of(package: str) -> str | None:
    """The smallest extra that installs an importable package; None where no target needs it."""
    for row in TABLE:
        for needed, extra in ((row.serve_packages, row.serve_extra), (row.export_packages, row.export_extra)):
            if any(package in alternatives for alternatives in needed):
                return extra
    return None


def load(path: str) -> Any:
    """What an import path of the table names: a module, or `module:attribute`."""
    module, _, attribute = path.partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def target_of(bundle_path: object, name: str) -> Target:
    """The target of a bundle.

    Raises:
        BundleError: This installation has no such target.
    """
    try:
        return find(name)
    except ConfigError as error:
        raise BundleError(
            f"{bundle_path} was made for target {name!r}; this installation runs {', '.join(names())}"
        ) from error


def open_backend(bundle: Bundle, device: str | None = None, options: BackendOptions | None = None) -> Backend:
    """Loads a bundle into the backend that runs its target on a device.

    Args:
        bundle: Opened.
        device: Where to compute; None takes the target's first device, and that of a bundle of compiled programs.
        options: What the backend may use.

    Raises:
        ConfigError: The target does not run on the device.
        MissingDependencyError: The backend's package, driver or device is absent; no other device is tried.
    """
    from onetrans.runtime.backends.base import BackendOptions

    row = target_of(bundle.path, bundle.manifest.target)
    devices = tuple(row.backends) if row.trust == "data" else (bundle.manifest.device,)
    chosen = device or devices[0]
    if chosen not in devices or chosen not in row.backends:
        raise ConfigError(f"{bundle.path} cannot run on {chosen!r}; target {row.name} runs it on {', '.join(devices)}")
    backend = cast("Callable[[Bundle, BackendOptions], Backend]", load(row.backends[chosen]))
    return backend(bundle, options or BackendOptions())
