"""Small model configurations that between them use every option that changes a graph."""

from __future__ import annotations

from typing import Any

from onetrans.export.models.base import adapt
from onetrans.export.programs import Programs, make_programs
from onetrans.features.synthetic.logs import log_schema
from onetrans.model.config import ModelConfig

SCHEMA = log_schema(items=200, categories=20, tags=30, item_dim=8, category_dim=4, tag_dim=4, age_dim=4, hour_dim=4)


def programs_of(model: Any) -> Programs:
    """The programs of a model, within the default bounds."""
    adapter = adapt(model)
    return make_programs(adapter, adapter.bounds(max_users=64, max_candidates=2048))


def small_config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "name": "small",
        "schema": SCHEMA,
        "event_hidden": 16,
        "tokenizer_hidden": 24,
        "l_ns": 4,
        "d": 32,
        "heads": 2,
        "layers": 3,
        "max_history": 64,
        "append_chunk": 8,
        "head_hidden": 16,
        "schedule": "explicit",
        "explicit_keep": (64, 24, 6),
    }
    return ModelConfig(**{**values, **changes})


VARIANTS: dict[str, dict[str, Any]] = {
    "auto_split": {},
    "group_wise": {
        "tokenizer": "group_wise",
        "l_ns": 5,
        "norm_gain": "per_token",
        "gated": True,
        "bias": True,
        "activation": "silu",
        "positions": "sinusoidal",
    },
    "intent": {
        "merge": "intent",
        "event_mlp": "per_behaviour",
        "head_pooling": "concat",
        "output_projection": "shared",
        "activation": "relu",
        "append_chunk": 1,
    },
    "group_wise_last": {
        "tokenizer": "group_wise",
        "l_ns": 5,
        "head_pooling": "concat",
        "output_projection": "none",
        "heads": 1,
        "layers": 1,
        "explicit_keep": (64,),
    },
}
