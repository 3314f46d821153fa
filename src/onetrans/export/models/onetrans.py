"""OneTrans as export sees it: input specs, example values, the past of an append, and parity cases."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from onetrans.export.models.base import Bounds, CaptureInputs
from onetrans.features.encode import input_specs
from onetrans.features.encoder import ParsedRequest, RequestEncoder
from onetrans.features.merge import Merge
from onetrans.features.random_requests import random_request
from onetrans.features.schema import Feature
from onetrans.model.checkpoint import weights_hash
from onetrans.model.onetrans import OneTrans
from onetrans.parity.cases import Arrays, ParityCase
from onetrans.precision import of_torch
from onetrans.spec import CACHED, State, TensorSpec

SIZES = {"U": 2, "C": 3, "L": 5}  # of the capture's example; at least 2, and no two alike


class OneTransAdapter:
    """A OneTrans; see `onetrans.export.models.base.ModelAdapter`."""

    family = "onetrans"

    def __init__(self, model: OneTrans) -> None:
        self.module: OneTrans = model.eval()
        c = model.config
        self.name = c.name
        self.config: Mapping[str, Any] = c.to_json()
        self.tasks = c.tasks
        self.pyramid = c.pyramid
        self.description: Mapping[str, str] = {
            "width": str(c.d),
            "heads": str(c.heads),
            "NS-tokens": str(c.l_ns),
        }

    @classmethod
    def accepts(cls, model: object) -> bool:
        """See `ModelAdapter.accepts`."""
        return isinstance(model, OneTrans)

    def weights_sha256(self) -> str:
        """See `ModelAdapter.weights_sha256`."""
        return weights_hash(self.module)

    def bounds(self, *, max_users: int, max_candidates: int) -> dict[str, tuple[int, int]]:
        """See `ModelAdapter.bounds`; L counts from 0, an empty history."""
        return {"U": (1, max_users), "C": (1, max_candidates), "L": (0, self.pyramid.capacities[0])}

    def capture_inputs(self, bounds: Bounds) -> CaptureInputs:
        """See `ModelAdapter.capture_inputs`; an intent-ordered merge and the sliding tail (c = 1) have no past."""
        c = self.module.config
        bounds = {name: (max(1, low), high) for name, (low, high) in bounds.items()}
        inputs, specs = self.example_inputs(0), input_specs(c.schema)
        user, candidate = ([spec for spec in specs if spec.scope == scope] for scope in ("user", "candidate"))
        arguments = tuple({spec.name: inputs[spec.name] for spec in part} for part in (user, candidate))
        order = (*user, *candidate)
        if c.merge != "time" or c.append_chunk == 1:
            return CaptureInputs(arguments=(*arguments, None), specs=order, bounds=bounds)
        past, past_specs = [], []
        dtype = self.module.norm.dtype
        for layer, capacity in enumerate(self.pyramid.capacities[:-1]):
            shape = (SIZES["U"], 7 + layer, c.heads, c.head_dim)
            past.append(tuple(torch.randn(shape, dtype=dtype) for _ in CACHED))
            bounds[f"W{layer}"] = (1, capacity)
            past_specs += [
                TensorSpec(
                    name=f"past_{role[0]}{layer}",
                    dtype=of_torch(dtype).name,
                    dims=("U", f"W{layer}", c.heads, c.head_dim),
                    scope="user",
                    state=State(role=role, layer=layer, capacity=capacity),
                )
                for role in CACHED
            ]
        return CaptureInputs(arguments=(*arguments, past), specs=(*order, *past_specs), bounds=bounds)

    def example_inputs(self, seed: int, sizes: Mapping[str, int] | None = None) -> dict[str, torch.Tensor]:
        """See `ModelAdapter.example_inputs`; ids are 1 and up, so that two seeds differ wherever they can."""
        schema, sizes = self.module.config.schema, sizes or SIZES
        generator = torch.Generator().manual_seed(seed)
        features = {f"{part}_{feature.name}": feature for part, feature in schema.features()}
        inputs: dict[str, torch.Tensor] = {}
        for spec in input_specs(schema):
            shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims]
            if spec.name == "event_behaviour":
                inputs[spec.name] = torch.randint(0, len(schema.behaviours), shape, generator=generator)
            elif spec.name == "history_length":
                inputs[spec.name] = torch.full(shape, sizes["L"] - seed % 2)
            elif spec.name == "history_start":
                inputs[spec.name] = torch.zeros(shape, dtype=torch.int64)
            else:
                inputs[spec.name] = _random_feature(features[spec.name], shape, generator)
        return inputs

    def cases(self, bounds: Bounds, seed: int) -> list[ParityCase]:
        """See `ModelAdapter.cases`; the float64 copy of the model is the reference."""
        max_candidates, max_users = bounds["C"][1], bounds["U"][1]
        chunk, full = self.pyramid.chunk, self.pyramid.max_history
        short = min(full, max(2, full // 10 + 1))
        beyond = full + 2 * chunk + chunk // 2
        few, hundred, many = (min(count, max_candidates) for count in (7, 100, 500))
        plain: list[tuple[str, list[int], int]] = [
            ("empty history", [0], few),
            ("one event", [1], few),
            ("short history, one candidate", [short], 1),
            ("full history, one candidate", [full], 1),
            (f"full history, {hundred} candidates", [full], hundred),
            (f"longer than full, {many} candidates", [beyond], many),
            ("several users, mixed lengths", [0, full, 1, short, beyond][:max_users], min(63, max_candidates)),
        ]
        made = _Cases(self.module, np.random.default_rng(seed))
        cases = [made.prefill(name, lengths, candidates) for name, lengths, candidates in plain]
        if self.config["merge"] == "time" and chunk > 1:
            anchor = beyond // chunk * chunk
            for old, new in ((chunk, 2 * chunk - 1), (anchor, anchor + chunk // 2)):
                cases.append(made.append(old, new, min(63, max_candidates)))
        return cases


class _Cases:
    """Makes cases of random requests, with the logits of a model and of its float64 copy."""

    def __init__(self, model: OneTrans, rng: np.random.Generator) -> None:
        config = model.config
        self.model, self.reference = model, copy.deepcopy(model).double()
        self.encoder = RequestEncoder(schema=config.schema, merge=cast(Merge, config.merge), pyramid=config.pyramid)
        self.rng = rng

    def prefill(self, name: str, lengths: Sequence[int], candidates: int) -> ParityCase:
        """Histories of so many events, prefilled."""
        parsed = self._requests(lengths, candidates)
        return self._case(name, parsed, prefill=self.encoder.user_inputs(parsed), append={})

    def append(self, old: int, new: int, candidates: int) -> ParityCase:
        """A state of the first `old` events grown to `new`."""
        assert self.encoder.pyramid.can_append(old, new)
        parsed = self._requests([new], candidates)
        before = [replace(one, tokens={name: column[:old] for name, column in one.tokens.items()}) for one in parsed]
        return self._case(
            f"append {new - old} events to {old}",
            parsed,
            prefill=self.encoder.user_inputs(before),
            append=self.encoder.user_inputs(parsed, [old]),
        )

    def _requests(self, lengths: Sequence[int], candidates: int) -> list[ParsedRequest]:
        schema = self.encoder.schema
        requests = [random_request(schema, events=n, candidates=candidates, rng=self.rng) for n in lengths]
        return [self.encoder.parse(request) for request in requests]

    def _case(self, name: str, parsed: Sequence[ParsedRequest], *, prefill: Arrays, append: Arrays) -> ParityCase:
        inputs = self.encoder.inputs(parsed)
        return ParityCase(
            name=name,
            prefill=prefill,
            append=append,
            decode=self.encoder.profiles(parsed) | self.encoder.candidate_inputs(parsed)[0],
            reference=run_model(self.reference, inputs),
            eager=run_model(self.model, inputs),
            tokens=np.array([one.length for one in parsed], dtype=np.int64),
        )


def run_model(model: OneTrans, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """One pass of the model as it is, in its own dtype; logits per task [U, C]."""
    dtype = model.norm.dtype
    scopes: dict[str, dict[str, torch.Tensor]] = {"user": {}, "candidate": {}}
    for spec in input_specs(model.config.schema):
        tensor = torch.from_numpy(np.ascontiguousarray(inputs[spec.name]))
        scopes[spec.scope][spec.name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    with torch.inference_mode():
        return {task: logits.numpy() for task, logits in model(scopes["user"], scopes["candidate"]).items()}


def _random_feature(feature: Feature, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    if feature.kind == "numeric":
        return torch.randn(shape, generator=generator)
    return torch.randint(1, feature.vocab, shape, generator=generator)
