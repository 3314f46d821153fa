"""The whole model's behaviour: what may change a score and what may not, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from onetrans.features.encode import input_specs
from onetrans.features.schema import FeatureSchema
from onetrans.features.synthetic.logs import log_schema
from onetrans.model.checkpoint import random_model
from onetrans.model.config import ModelConfig
from onetrans.model.onetrans import OneTrans
from onetrans.model.presets import preset

Inputs = dict[str, torch.Tensor]
Scores = dict[str, torch.Tensor]
SCHEMA = log_schema(items=60, categories=10, tags=20, item_dim=8, category_dim=4, tag_dim=4)
CONFIG = ModelConfig(
    name="test",
    schema=SCHEMA,
    event_hidden=16,
    tokenizer_hidden=16,
    l_ns=3,
    d=16,
    heads=2,
    layers=3,
    max_history=24,
    append_chunk=8,
    schedule="explicit",
    explicit_keep=(24, 10, 3),
    head_hidden=8,
)
GROUPED = dataclasses.replace(CONFIG, tokenizer="group_wise", l_ns=5)
TOLERANCE = 1e-12  # float64 round-off over three layers; a wrong mask shows at 1e-2
LONGEST = CONFIG.max_history + CONFIG.append_chunk - 1


def model_of(config: ModelConfig, seed: int = 0) -> OneTrans:
    """Random weights, all of them: gains and biases too, so that none hides behind ones and zeros."""
    model = random_model(config, seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name or ".b" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def random_inputs(
    schema: FeatureSchema, *, users: int, tokens: int, candidates: int, seed: int = 0, behaviours: int = 0
) -> Inputs:
    """Every input with legal random values; whole windows of `tokens`."""
    rng = np.random.default_rng(seed)
    sizes = {"U": users, "L": tokens, "C": candidates}
    features = {f"{part}_{f.name}": f for part, f in schema.features()}
    inputs = {}
    for spec in input_specs(schema):
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in spec.dims]
        if spec.name in features and spec.dtype == "int64":
            inputs[spec.name] = torch.from_numpy(rng.integers(features[spec.name].vocab, size=shape))
        elif spec.dtype == "float32":
            inputs[spec.name] = torch.from_numpy(rng.normal(size=shape))
    inputs["event_behaviour"] = torch.from_numpy(
        rng.integers(behaviours or len(schema.behaviours), size=(users, tokens))
    )
    inputs["history_length"] = torch.full((users,), tokens)
    inputs["history_start"] = torch.zeros(users, dtype=torch.int64)
    return inputs


def by_scope(inputs: Inputs) -> tuple[Inputs, Inputs]:
    candidate = {name: value for name, value in inputs.items() if name.startswith("candidate_")}
    return {name: value for name, value in inputs.items() if name not in candidate}, candidate


def scores(model: OneTrans, inputs: Inputs, **kwargs: Any) -> Scores:
    with torch.no_grad():
        out: Scores = model(*by_scope(inputs), **kwargs)
    return out


def assert_close(found: Scores, expected: Scores, tolerance: float = TOLERANCE) -> None:
    for task in expected:
        assert torch.isfinite(found[task]).all()
        assert found[task].shape == expected[task].shape
        assert (found[task] - expected[task]).abs().max() <= tolerance, task


@contextmanager
def captured_keys(model: OneTrans) -> Iterator[list[list[tuple[torch.Tensor, torch.Tensor]]]]:
    """K and V of every layer's window in each forward of the block, [call][layer]."""
    calls: list[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def spy(block: Any, original: Any) -> Any:
        def keys(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if block.index == 0:
                calls.append([])
            calls[-1].append(original(x))
            return calls[-1][-1]

        return keys

    for block in model.stack.blocks:
        block.history_keys = spy(block, block.history_keys)
    try:
        yield calls
    finally:
        for block in model.stack.blocks:
            del block.history_keys


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "intent": {"merge": "intent"},
    "per_behaviour": {"event_mlp": "per_behaviour"},
    "intent_per_behaviour": {"merge": "intent", "event_mlp": "per_behaviour"},
    "group_wise": {"tokenizer": "group_wise", "l_ns": 5},
    "gated": {"gated": True},
    "bias": {"bias": True},
    "gated_bias": {"gated": True, "bias": True},
    "per_token_norm": {"norm_gain": "per_token"},
    "no_output_projection": {"output_projection": "none"},
    "shared_output_projection": {"output_projection": "shared"},
    "sinusoidal": {"positions": "sinusoidal"},
    "last": {"head_pooling": "last"},
    "concat": {"head_pooling": "concat"},
    "group_wise_concat": {"tokenizer": "group_wise", "l_ns": 5, "head_pooling": "concat"},
    "group_wise_rich": {
        "tokenizer": "group_wise",
        "l_ns": 5,
        "bias": True,
        "norm_gain": "per_token",
        "output_projection": "shared",
    },
    "silu": {"activation": "silu"},
    "relu": {"activation": "relu"},
    "sliding": {"append_chunk": 1},
    "no_pyramid": {"schedule": "none", "explicit_keep": ()},
    "linear_shrunk": {"schedule": "linear_shrunk", "explicit_keep": ()},
    "one_layer": {"layers": 1, "explicit_keep": (3,)},
    "one_task": {"tasks": ("ctr",)},
}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS.keys())
def any_config(request: pytest.FixtureRequest) -> ModelConfig:
    return dataclasses.replace(CONFIG, **request.param)


def longest(config: ModelConfig) -> int:
    return config.pyramid.capacities[0]


def ragged(config: ModelConfig, lengths: list[int], candidates: int = 3) -> Inputs:
    kinds = len(config.schema.behaviours) * (2 if config.merge == "intent" else 1)
    inputs = random_inputs(
        config.schema, users=len(lengths), tokens=max(1, *lengths), candidates=candidates, behaviours=kinds
    )
    return inputs | {"history_length": torch.tensor(lengths)}


def test_padding_never_changes_a_score(any_config: ModelConfig) -> None:
    """Garbage behind the valid tokens, and a longer padding, leave every score as it was."""
    model, most = model_of(any_config), longest(any_config)
    lengths = [0, 1, most // 2, most - 1]
    inputs = ragged(any_config, lengths)
    expected = scores(model, inputs)
    other = random_inputs(any_config.schema, users=len(lengths), tokens=most - 1 + 9, candidates=3, seed=7)
    for name in [name for name in inputs if name.startswith("event_")]:
        garbage = other[name] * 1e3 if other[name].is_floating_point() else other[name]
        for user, length in enumerate(lengths):
            garbage[user, :length] = inputs[name][user, :length]
        inputs[name] = garbage
    assert_close(scores(model, inputs), expected)


def test_a_mixed_batch_equals_one_by_one(any_config: ModelConfig) -> None:
    model, most = model_of(any_config), longest(any_config)
    lengths = sorted({0, 1, 2, most // 3, most // 2, most - 1, most})
    inputs = ragged(any_config, lengths)
    together = scores(model, inputs)
    for user, length in enumerate(lengths):
        alone = {
            name: value[user : user + 1, : max(1, length)] if name.startswith("event_") else value[user : user + 1]
            for name, value in inputs.items()
        }
        assert_close({task: value[user : user + 1] for task, value in together.items()}, scores(model, alone))


def test_candidates_do_not_influence_each_other(any_config: ModelConfig) -> None:
    model = model_of(any_config)
    inputs = ragged(any_config, [0, 5, 17], candidates=9)
    together = scores(model, inputs)
    order = [4, 0, 8, 2]
    few = {name: value[:, order] if name.startswith("candidate_") else value for name, value in inputs.items()}
    assert_close(scores(model, few), {task: value[:, order] for task, value in together.items()})
    one = {name: value[:, 6:7] if name.startswith("candidate_") else value for name, value in inputs.items()}
    assert_close(scores(model, one), {task: value[:, 6:7] for task, value in together.items()})


def test_every_option_learns_through_every_weight(any_config: ModelConfig) -> None:
    """Forward and backward; all weights that can matter get a gradient, and it is the slope of the loss."""
    model = model_of(any_config).train()
    inputs = ragged(any_config, [3, longest(any_config) - 2, 11])

    def loss() -> torch.Tensor:
        return torch.stack([(value * value).mean() + value.sum() for value in model(*by_scope(inputs)).values()]).sum()

    loss().backward()
    top = len(any_config.keep) - 1
    dead = {f"stack.blocks.{top}.{name}" for name in ("wq_s", "w1_s", "w2_s", "bq_s", "b1_s", "b2_s")}
    if any_config.output_projection == "mixed":
        dead.add(f"stack.blocks.{top}.wo_s")
    if any_config.norm_gain == "per_token":
        dead.add(f"stack.blocks.{top}.norm2")  # of the S-tokens alone
    generator = torch.Generator().manual_seed(1)
    moved, expected = [], torch.zeros((), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if name in dead:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / parameter.numel() ** 0.5
        if "tables" in name:
            direction[0] = 0  # the unknown id's row, which stays zero
        moved.append((parameter, direction))
        expected += (parameter.grad * direction).sum()
    if any_config.activation == "relu":
        return  # a kink may lie within the step
    step, found = 1e-5, []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, direction in moved:
                parameter.add_(sign * step * direction)
            found.append(loss())
    slope = (found[0] - found[1]) / (2 * step)
    assert abs(slope - expected) <= 1e-6 * (1 + abs(expected))


@pytest.mark.parametrize("name", ["candidate", "user"])
def test_user_groups_do_not_see_candidates(name: str) -> None:
    """Tokens of user-scope groups are the same whatever the candidates; those of candidate-scope ones are not."""
    model = model_of(GROUPED)
    first, second = ragged(GROUPED, [6, 20]), ragged(GROUPED, [6, 20])
    fresh = random_inputs(SCHEMA, users=2, tokens=20, candidates=3, seed=5)
    second |= {key: value for key, value in fresh.items() if key.startswith("candidate_")}
    tokens = []
    for inputs in (first, second):
        user, candidate = by_scope(inputs)
        with torch.no_grad():
            before = model.features(user, candidate)
            after = model.stack(model.events(user), *before, user["history_start"], user["history_length"])
        tokens.append(after[0 if name == "user" else 1])
    assert tokens[0].shape[0] == (GROUPED.user_tokens if name == "user" else GROUPED.l_ns - GROUPED.user_tokens)
    same = torch.equal(tokens[0], tokens[1])
    assert same if name == "user" else not same


def test_history_matters_and_so_does_its_order() -> None:
    model = model_of(CONFIG)
    inputs = ragged(CONFIG, [20, 20])
    plain = scores(model, inputs)["ctr"]
    turned = scores(model, {n: v.flip(1) if n.startswith("event_") else v for n, v in inputs.items()})["ctr"]
    assert (turned - plain).abs().max() > 1e-6
    without = scores(model, inputs | {"history_length": torch.zeros(2, dtype=torch.int64)})["ctr"]
    assert (without - plain).abs().max() > 1e-3


@pytest.mark.parametrize("options", ["default", "group_wise_concat", "sinusoidal", "gated_bias", "per_behaviour"])
@pytest.mark.parametrize(("old", "new"), [(1, 5), (8, 15), (16, 23), (40, 47), (41, 42)], ids=lambda n: str(n))
def test_append_equals_a_fresh_pass(options: str, old: int, new: int) -> None:
    """Between two anchors, new events on top of cached K and V score as all events do in one pass."""
    config = dataclasses.replace(CONFIG, **OPTIONS[options])
    model = model_of(config)
    whole = random_inputs(config.schema, users=1, tokens=new, candidates=4, seed=new)

    def events(begin: int, end: int) -> Inputs:
        cut = {n: v[:, begin:end] if n.startswith("event_") else v for n, v in whole.items()}
        return cut | {"history_start": torch.tensor([begin]), "history_length": torch.tensor([end - begin])}

    first = config.pyramid.starts(old)[0]
    assert first == config.pyramid.starts(new)[0]
    with captured_keys(model) as calls:
        scores(model, events(first, old))
        fresh = scores(model, events(first, new))
        past, expected = calls[0], calls[1]
        appended = scores(model, events(old, new), past=past)
    assert_close(appended, fresh)
    for layer, ((k, v), (all_k, all_v)) in enumerate(zip(calls[2], expected, strict=True)):
        for mine, fresh_value in ((k, all_k), (v, all_v)):
            count = min(new - old, fresh_value.shape[1])
            starts = config.pyramid.starts(new)
            valid = new - max(starts[layer], first)
            tail = fresh_value[:, valid - count : valid]
            mine_valid = mine[:, : new - max(starts[layer], old)]
            assert (mine_valid[:, -count:] - tail).abs().max() <= TOLERANCE, layer


def test_append_of_a_ragged_batch_with_padded_state() -> None:
    model = model_of(CONFIG)
    olds, news = [0, 3, 9, 41], [7, 6, 9, 45]
    whole = random_inputs(SCHEMA, users=4, tokens=45, candidates=2, seed=3)

    def part(begins: list[int], ends: list[int]) -> Inputs:
        longest = max(1, *(e - b for b, e in zip(begins, ends, strict=True)))
        inputs = dict(whole)
        for name in [n for n in whole if n.startswith("event_")]:
            rows = [whole[name][u, b : b + longest] for u, b in enumerate(begins)]
            inputs[name] = torch.stack([torch.cat([r, r.new_ones((longest - len(r), *r.shape[1:]))]) for r in rows])
        lengths = [e - b for b, e in zip(begins, ends, strict=True)]
        return inputs | {"history_start": torch.tensor(begins), "history_length": torch.tensor(lengths)}

    firsts = [CONFIG.pyramid.starts(n)[0] for n in olds]
    with captured_keys(model) as calls:
        scores(model, part(firsts, olds))
    past = []
    for layer, (k, v) in enumerate(calls[0]):
        valid = torch.tensor([old - CONFIG.pyramid.starts(old)[layer] for old in olds])
        hole = torch.arange(k.shape[1]) >= valid[:, None]
        past.append(tuple(x.masked_fill(hole[:, :, None, None], 1e6) for x in (k, v)))
    fresh = scores(model, part([CONFIG.pyramid.starts(n)[0] for n in news], news))
    assert_close(scores(model, part(olds, news), past=past), fresh)


@pytest.mark.parametrize(("name", "millions"), [("onetrans-s", 91), ("onetrans-l", 330)])
def test_parameter_counts_of_the_paper(name: str, millions: int) -> None:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in OneTrans(preset(name)).parameters())
    assert abs(count / 1e6 - millions) <= 0.05 * millions


def test_schedules_of_the_paper() -> None:
    assert preset("onetrans-s").keep == (1190, 960, 704, 480, 256, 12)
    shrunk = dataclasses.replace(preset("onetrans-s"), schedule="linear_shrunk")
    assert shrunk.keep == (992, 800, 608, 416, 224, 12)
    large = preset("onetrans-l").keep
    assert (large[0], large[-1], len(large)) == (1500, 16, 8)
