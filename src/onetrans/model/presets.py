"""Named configurations. Sizes of OneTrans-S and -L follow arXiv 2510.26104, table 2.

The paper does not say how its parameter counts divide between the stack, the embeddings and the tokenizers; the item
table is sized to reach them.
"""

from __future__ import annotations

from collections.abc import Callable

from onetrans.errors import ConfigError
from onetrans.features.synthetic.logs import log_schema
from onetrans.model.config import ModelConfig


def _tiny() -> ModelConfig:
    return ModelConfig(
        name="tiny",
        schema=log_schema(),
        event_hidden=64,
        tokenizer_hidden=128,
        l_ns=4,
        d=64,
        heads=2,
        layers=2,
        max_history=64,
        schedule="linear_shrunk",
        head_hidden=32,
    )


def _small() -> ModelConfig:
    return ModelConfig(
        name="onetrans-s",
        schema=log_schema(items=350_000, categories=10_000, tags=20_000, item_dim=64, category_dim=32, tag_dim=16),
        event_hidden=256,
        tokenizer_hidden=2048,
        l_ns=12,
        d=256,
        heads=4,
        layers=6,
        max_history=1190,
        head_hidden=128,
    )


def _large() -> ModelConfig:
    return ModelConfig(
        name="onetrans-l",
        schema=log_schema(items=1_000_000, categories=20_000, tags=50_000, item_dim=64, category_dim=32, tag_dim=16),
        event_hidden=384,
        tokenizer_hidden=3072,
        l_ns=16,
        d=384,
        heads=4,
        layers=8,
        max_history=1500,
        head_hidden=256,
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {"tiny": _tiny, "onetrans-s": _small, "onetrans-l": _large}


def preset(name: str) -> ModelConfig:
    """The configuration of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; allowed: {', '.join(PRESETS)}")
    return PRESETS[name]()
