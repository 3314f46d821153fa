"""The manifest: a bundle's JSON contract, in one canonical form so that any changed byte shows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onetrans.errors import BundleError, ConfigError
from onetrans.features.encode import TensorSpec
from onetrans.features.schema import FeatureSchema
from onetrans.features.windows import can_append, window_starts

FORMAT = "onetrans-bundle"
SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"
GOLD_FILE = "gold.safetensors"

DTYPE_BYTES = {"int64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class StateTensor:
    """One tensor of the state.

    Attributes:
        spec: As decode reads it.
        window: The layer whose window it holds, token axis 1; None for a value that every prefill or append makes anew.
        capacity: Most tokens in that window; 0 where `window` is None.
    """

    spec: TensorSpec
    window: int | None
    capacity: int

    @property
    def shape_per_user(self) -> tuple[int, ...]:
        """The shape that a user takes at most, without the axis of users."""
        dims = self.spec.dims[1:]
        return tuple(
            self.capacity if axis == 0 and self.window is not None else int(dim) for axis, dim in enumerate(dims)
        )

    @property
    def bytes_per_user(self) -> int:
        """Bytes that a user takes at most."""
        return math.prod(self.shape_per_user) * DTYPE_BYTES[self.spec.dtype]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One graph of the bundle: its file, inputs and outputs, and the tensors of the weights file that it reads."""

    file: str
    weights: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The pyramid's anchored windows (onetrans.features.windows)."""

    max_history: int
    keep: tuple[int, ...]
    append_chunk: int

    def starts(self, tokens: int) -> tuple[int, ...]:
        """First token of each layer's window in a history of so many tokens [layers]."""
        return window_starts(tokens, max_history=self.max_history, keep=self.keep, chunk=self.append_chunk)[:-1]

    def can_append(self, old: int, new: int) -> bool:
        """Whether a state of `old` tokens can grow to `new` exactly."""
        return can_append(old, new, max_history=self.max_history, keep=self.keep, chunk=self.append_chunk)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that a bundle says of itself.

    Attributes:
        name: The model's name.
        target: `onnx`.
        device: What it was lowered for.
        precision: dtype of weights, activations and state.
        model: The model's configuration as plain data.
        weights_sha256: Hash of the weights it was made from.
        bounds: Least and greatest U, C and L (tokens of a window); L counts from 0, an empty history.
        windows: The anchored windows.
        append_only: Whether appending to a state can be exact; an intent-ordered merge never is.
        graphs: `prefill`, `decode`, and `append` where it can be exact.
        state: What crosses from prefill to decode.
        tasks: Outputs of decode.
        split: The split's report, for `onetrans inspect`.
        parity: Errors measured when the bundle was made.
        tools: Versions of what made it.
        created: When, in UTC.
        files: sha256 and size of every other file.
    """

    name: str
    target: str
    device: str
    precision: str
    model: Mapping[str, Any]
    weights_sha256: str
    bounds: Mapping[str, tuple[int, int]]
    windows: Windows
    append_only: bool
    graphs: Mapping[str, Graph]
    state: tuple[StateTensor, ...]
    tasks: tuple[str, ...]
    split: Mapping[str, Any]
    parity: Mapping[str, Any]
    tools: Mapping[str, str]
    created: str
    files: Mapping[str, Mapping[str, Any]]

    @property
    def schema(self) -> FeatureSchema:
        """The model's features."""
        return FeatureSchema.from_json(self.model["schema"])

    @property
    def merge(self) -> str:
        """How behaviours become one sequence."""
        return str(self.model["merge"])

    @property
    def bytes_per_user(self) -> int:
        """Bytes of state that a user takes at most."""
        return sum(tensor.bytes_per_user for tensor in self.state)

    def dumps(self) -> str:
        """The canonical text: sorted keys, two spaces, and a digest of the rest."""
        body = {"format": FORMAT, "schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        body["bytes_per_user"] = self.bytes_per_user
        body["digest"] = _digest(body)
        return _canonical(body)

    @classmethod
    def loads(cls, text: str, where: str) -> Manifest:
        """Reads what `dumps` wrote.

        Raises:
            BundleError: Not a manifest, of a newer schema, changed, or incomplete.
        """
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{where} is not JSON ({error}); export the bundle again") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise BundleError(f"{where} does not describe a OneTrans bundle; its format must be {FORMAT!r}")
        version = body.get("schema_version")
        if type(version) is not int or version < 1:
            raise BundleError(f"{where} has schema version {version!r}; expected a whole number from 1")
        if version > SCHEMA_VERSION:
            raise BundleError(
                f"{where} has schema version {version}; this release reads up to {SCHEMA_VERSION}: upgrade"
            )
        try:
            digest = body.pop("digest", None)
            changed = digest != _digest(body) or text != _canonical({**body, "digest": digest})
        except UnicodeEncodeError:  # half a surrogate pair, which `dumps` never writes
            changed = True
        if changed:
            raise BundleError(f"{where} was changed since it was written; export the bundle again")
        del body["format"], body["schema_version"]
        stated = body.pop("bytes_per_user", None)
        try:
            manifest = cls(
                **{
                    **body,
                    "bounds": {name: (int(low), int(high)) for name, (low, high) in body["bounds"].items()},
                    "windows": Windows(**{**body["windows"], "keep": tuple(body["windows"]["keep"])}),
                    "graphs": {name: _graph(graph) for name, graph in body["graphs"].items()},
                    "state": tuple(StateTensor(**{**t, "spec": _spec(t["spec"])}) for t in body["state"]),
                    "tasks": tuple(body["tasks"]),
                }
            )
            _check(manifest, stated)
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise BundleError(f"{where} lacks or misstates a field: {what}; export the bundle again") from error
        return manifest


def _check(manifest: Manifest, bytes_per_user: object) -> None:
    """Raises what `Manifest.loads` catches where a field is not what its readers take it for."""
    for name in ("name", "target", "device", "precision", "weights_sha256", "created"):
        _expect(name, getattr(manifest, name), str)
    for name in ("model", "bounds", "graphs", "split", "parity", "tools", "files"):
        _expect(name, getattr(manifest, name), dict)
    _expect("append_only", manifest.append_only, bool)
    for name, file in manifest.files.items():
        _expect(f"files {name}", file, dict)
    for name in ("prefill", "decode", *(["append"] if manifest.append_only else [])):
        if name not in manifest.graphs:
            raise ValueError(f"graph {name!r} is absent")
    for name in ("U", "C", "L"):
        low, high = manifest.bounds[name]
        if not 0 <= low <= high:
            raise ValueError(f"bounds {name} are {low} to {high}")
    w = manifest.windows
    if not all(type(n) is int and n > 0 for n in (w.max_history, w.append_chunk, *w.keep)):
        raise ValueError(f"windows {w} must be whole numbers from 1")
    if manifest.precision not in DTYPE_BYTES:
        raise ValueError(f"precision is {manifest.precision!r}")
    if not manifest.tasks or manifest.tasks != tuple(spec.name for spec in manifest.graphs["decode"].outputs):
        raise ValueError(f"tasks {manifest.tasks} are not what decode gives")
    for name in ("d", "heads", "l_ns"):
        _expect(f"model {name}", manifest.model[name], int)
    _expect("model merge", manifest.model["merge"], str)
    _expect("model schema", manifest.schema, FeatureSchema)
    if manifest.bytes_per_user != bytes_per_user:
        raise ValueError(f"bytes_per_user is {bytes_per_user}, but the state takes {manifest.bytes_per_user}")


def _expect(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}, not of type {kind.__name__}")


def _spec(data: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(**{**data, "dims": tuple(data["dims"])})


def _graph(data: Mapping[str, Any]) -> Graph:
    specs = {side: tuple(_spec(spec) for spec in data[side]) for side in ("inputs", "outputs")}
    return Graph(file=str(data["file"]), weights=tuple(data["weights"]), **specs)


def _canonical(body: Mapping[str, Any]) -> str:
    return json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(body).encode()).hexdigest()
