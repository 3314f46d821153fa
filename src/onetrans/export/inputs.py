"""OneTrans's inputs for capture, probe and lowering: specs, bounds and example values."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from onetrans.export.capture import capture
from onetrans.export.config import ExportConfig
from onetrans.export.passes.drop_past import drop_past
from onetrans.export.probe import probe_split
from onetrans.export.program import Program
from onetrans.export.split import Split
from onetrans.export.subgraph import dtype_name
from onetrans.features.encode import TensorSpec, input_specs
from onetrans.features.schema import Feature
from onetrans.model.config import ModelConfig
from onetrans.model.onetrans import OneTrans

SIZES = {"U": 2, "C": 3, "L": 5}


def capture_model(model: OneTrans, config: ExportConfig) -> tuple[Program, Program | None]:
    """The forward with an empty state and, where appending can be exact, with a non-empty one; captured once."""
    c = model.config
    specs = {spec.name: spec for spec in input_specs(c.schema)}
    bounds = {**request_bounds(config), "L": (1, c.window_bounds[0])}
    inputs = random_inputs(c, SIZES, seed=0)
    user = {name: value for name, value in inputs.items() if specs[name].scope == "user"}
    candidate = {name: value for name, value in inputs.items() if specs[name].scope == "candidate"}
    order = [specs[name] for name in (*user, *candidate)]
    if c.merge != "time" or c.append_chunk == 1:
        return capture(model, (user, candidate, None), order, bounds, c.tasks), None
    past, past_specs = [], []
    dtype = model.norm.dtype
    for layer in range(c.layers):
        width = f"W{layer}"
        bounds[width] = (1, c.window_bounds[layer])
        shape = (SIZES["U"], 7 + layer, c.heads, c.head_dim)
        past.append((torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)))
        past_specs += [
            TensorSpec(
                name=f"past_{kind}{layer}",
                dtype=dtype_name(dtype),
                dims=("U", width, c.heads, c.head_dim),
                scope="user",
            )
            for kind in ("k", "v")
        ]
    append = capture(model, (user, candidate, past), [*order, *past_specs], bounds, c.tasks)
    return drop_past(append, [spec.name for spec in past_specs]), append


def random_inputs(config: ModelConfig, sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
    """Inputs of every spec, with full histories; ids 1 and up, so that two seeds differ wherever they can."""
    generator = torch.Generator().manual_seed(seed)
    features = {f"{part}_{feature.name}": feature for part, feature in config.schema.features()}
    inputs: dict[str, torch.Tensor] = {}
    for spec in input_specs(config.schema):
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims]
        if spec.name == "event_behaviour":
            inputs[spec.name] = torch.randint(0, len(config.schema.behaviours), shape, generator=generator)
        elif spec.name == "history_length":
            inputs[spec.name] = torch.full(shape, sizes["L"] - seed % 2)
        elif spec.name == "history_start":
            inputs[spec.name] = torch.zeros(shape, dtype=torch.int64)
        else:
            inputs[spec.name] = _random_feature(features[spec.name], shape, generator)
    return inputs


def _random_feature(feature: Feature, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    if feature.kind == "numeric":
        return torch.randn(shape, generator=generator)
    return torch.randint(1, feature.vocab, shape, generator=generator)


def request_bounds(config: ExportConfig) -> dict[str, tuple[int, int]]:
    """Least and greatest U and C."""
    return {"U": (1, config.max_users), "C": (1, config.max_candidates)}


def probe(config: ModelConfig, parts: Split) -> None:
    """Probes a split with two requests that differ everywhere (see `probe_split`)."""
    by_scope: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
    scope = {spec.name: spec.scope for spec in parts.whole.inputs}
    for seed in (0, 1):
        inputs = random_inputs(config, SIZES, seed)
        by_scope.append(
            (
                {name: value for name, value in inputs.items() if scope[name] == "user"},
                {name: value for name, value in inputs.items() if scope[name] == "candidate"},
            )
        )
    (user_a, candidates_a), (user_b, candidates_b) = by_scope
    probe_split(parts, user_a, user_b, candidates_a, candidates_b)
