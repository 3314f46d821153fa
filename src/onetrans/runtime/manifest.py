"""The manifest: a bundle's JSON contract, in one canonical form so that any changed byte shows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from onetrans.errors import BundleError, ConfigError
from onetrans.features.merge import MERGES, Merge
from onetrans.features.schema import FeatureSchema
from onetrans.features.windows import Pyramid
from onetrans.precision import BY_NAME, BY_SHORT
from onetrans.spec import Scope, State, TensorSpec

FORMAT = "onetrans-bundle"
SCHEMA_VERSION = 2
MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"
CASES_FILE = "cases.safetensors"


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One graph of the bundle.

    Attributes:
        file: Its name in the folder.
        inputs: What it takes, in order.
        outputs: What it gives, in order.
        weights: The tensors of the weights file that it reads.
    """

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that a bundle says of itself.

    Attributes:
        name: The model's name.
        family: The model family that made it, by its adapter's name.
        target: What the graphs were lowered to: a name in `onetrans.runtime.targets`.
        device: What they were lowered for.
        precision: dtype of weights, activations and state.
        model: The model's configuration as plain data; of every family it holds `schema` and `merge`.
        description: The model's sizes in words, for the picture: name to value.
        weights_sha256: Hash of the weights it was made from.
        bounds: Least and greatest U, C and L (tokens of a window); L counts from 0, an empty history.
        pyramid: The anchored windows.
        graphs: `prefill`, `decode`, and `append` where it can be exact.
        state: What crosses from prefill to decode; each tensor says its role, layer and capacity.
        tasks: Outputs of decode.
        split: The split's report, for `onetrans inspect`.
        parity: Errors measured when the bundle was made.
        tools: Versions of what made it.
        created: When, in UTC.
        files: sha256 and size of every other file.
    """

    name: str
    family: str
    target: str
    device: str
    precision: str
    model: Mapping[str, Any]
    description: Mapping[str, str]
    weights_sha256: str
    bounds: Mapping[str, tuple[int, int]]
    pyramid: Pyramid
    graphs: Mapping[str, Graph]
    state: tuple[TensorSpec, ...]
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
    def merge(self) -> Merge:
        """How behaviours become one sequence."""
        merge: Merge = self.model["merge"]
        return merge

    @property
    def can_append(self) -> bool:
        """Whether appending to a state can be exact; with an intent-ordered merge it never is."""
        return "append" in self.graphs

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
        if version != SCHEMA_VERSION:
            newer = version > SCHEMA_VERSION
            raise BundleError(
                f"{where} has schema version {version}; this release reads version {SCHEMA_VERSION}:"
                f" {'upgrade onetrans-export' if newer else 'export the bundle again'}"
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
                    "pyramid": Pyramid(**{**body["pyramid"], "keep": tuple(body["pyramid"]["keep"])}),
                    "graphs": {name: _graph(graph) for name, graph in body["graphs"].items()},
                    "state": tuple(_spec(tensor) for tensor in body["state"]),
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
    for name in ("name", "family", "target", "device", "precision", "weights_sha256", "created"):
        _expect(name, getattr(manifest, name), str)
    for name in ("model", "description", "bounds", "graphs", "split", "parity", "tools", "files"):
        _expect(name, getattr(manifest, name), dict)
    for name, text in manifest.description.items():
        _expect(f"description {name}", text, str)
    for name, file in manifest.files.items():
        _expect(f"files {name}", file, dict)
    for name in ("prefill", "decode"):
        if name not in manifest.graphs:
            raise ValueError(f"graph {name!r} is absent")
    for name in ("U", "C", "L"):
        low, high = manifest.bounds[name]
        if not 0 <= low <= high:
            raise ValueError(f"bounds {name} are {low} to {high}")
    if manifest.precision not in [row.name for row in BY_SHORT.values()]:
        raise ValueError(f"precision is {manifest.precision!r}")
    _check_state(manifest)
    if not manifest.tasks or manifest.tasks != tuple(spec.name for spec in manifest.graphs["decode"].outputs):
        raise ValueError(f"tasks {manifest.tasks} are not what decode gives")
    if manifest.model["merge"] not in MERGES:
        raise ValueError(f"model merge is {manifest.model['merge']!r}; allowed: {', '.join(MERGES)}")
    _expect("model schema", manifest.schema, FeatureSchema)
    if manifest.bytes_per_user != bytes_per_user:
        raise ValueError(f"bytes_per_user is {bytes_per_user}, but the state takes {manifest.bytes_per_user}")


def _check_state(manifest: Manifest) -> None:
    """Raises where the state is not one that pools and graphs can share."""
    if any(spec.state is None or spec.dims[:1] != ("U",) for spec in manifest.state):
        raise ValueError("a state tensor has no role, or its first axis is not U")
    identities = [spec.identity for spec in manifest.state]
    if len(set(identities)) != len(identities) or len({spec.name for spec in manifest.state}) != len(identities):
        raise ValueError("two state tensors have one name or one role and layer")
    if sum(spec.is_lengths for spec in manifest.state) != 1:
        raise ValueError("the state must hold the valid lengths of its windows, once")
    for name, graph in manifest.graphs.items():
        read = [spec.identity for spec in graph.inputs if spec.state is not None]
        if not set(read) <= set(identities):
            raise ValueError(f"{name} reads a state tensor that the state does not hold")
        if name != "decode" and [spec.identity for spec in graph.outputs if spec.state is not None] != identities:
            raise ValueError(f"{name} does not give the tensors of the state")


def _expect(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}, not of type {kind.__name__}")


def _spec(data: Mapping[str, Any]) -> TensorSpec:
    state = None if data["state"] is None else State(**data["state"])
    spec = TensorSpec(**{**data, "dims": tuple(data["dims"]), "state": state})
    if spec.dtype not in BY_NAME or spec.scope not in get_args(Scope) or not isinstance(spec.name, str):
        raise ValueError(f"tensor {spec.name!r} has dtype {spec.dtype!r} and scope {spec.scope!r}")
    return spec


def _graph(data: Mapping[str, Any]) -> Graph:
    specs = {side: tuple(_spec(spec) for spec in data[side]) for side in ("inputs", "outputs")}
    return Graph(file=str(data["file"]), weights=tuple(data["weights"]), **specs)


def _canonical(body: Mapping[str, Any]) -> str:
    return json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(body).encode()).hexdigest()
