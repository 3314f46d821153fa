"""What `inspect` and its picture read of a manifest; nothing else in the command line knows a manifest's inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onetrans.features.windows import window_bounds
from onetrans.runtime.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class StateRow:
    """One tensor of the state.

    Attributes:
        name: The tensor's name.
        dtype: The tensor's dtype.
        dims: The shape as text, such as `[U, L, 4, 64]`.
        layer: The layer whose keys or values it holds, from 0; None for a tensor of fixed size.
        capacity: The most tokens that it holds; 0 where `layer` is None.
        nbytes: The most bytes that it takes per user.
    """

    name: str
    dtype: str
    dims: str
    layer: int | None
    capacity: int
    nbytes: int


def state_rows(manifest: Manifest) -> list[StateRow]:
    """Every tensor of the state, in the manifest's order."""
    return [
        StateRow(
            name=tensor.spec.name,
            dtype=tensor.spec.dtype,
            dims=f"[{', '.join(str(dim) for dim in tensor.spec.dims)}]",
            layer=tensor.window,
            capacity=tensor.capacity,
            nbytes=tensor.bytes_per_user,
        )
        for tensor in manifest.state
    ]


def queries(manifest: Manifest) -> list[int]:
    """The most tokens of the history that query in each layer; 0 in the last, where they would feed nothing."""
    w = manifest.windows
    bounds = window_bounds(max_history=w.max_history, keep=w.keep, chunk=w.append_chunk)
    return [*bounds[1:-1], 0]


def chunk(manifest: Manifest) -> int:
    """The events after which the windows move."""
    return manifest.windows.append_chunk


def describe(manifest: Manifest) -> Mapping[str, str]:
    """The model in a few words: a name and a value each."""
    model = manifest.model
    return {
        "layers": str(len(manifest.windows.keep)),
        "width": str(model["d"]),
        "heads": str(model["heads"]),
        "NS-tokens": str(model["l_ns"]),
    }


def feature_names(manifest: Manifest) -> dict[str, list[str]]:
    """Names of the input features, by where they come from: `history`, `profile` and `candidates`."""
    inputs = [*manifest.graphs["prefill"].inputs, *manifest.graphs["decode"].inputs]
    groups = {"event_": "history", "user_": "profile", "candidate_": "candidates"}
    state = {row.name for row in state_rows(manifest)}
    found: dict[str, list[str]] = {group: [] for group in groups.values()}
    for spec in inputs:
        prefix, _, name = spec.name.partition("_")
        if spec.name not in state and f"{prefix}_" in groups:
            found[groups[f"{prefix}_"]].append(name)
    return found
