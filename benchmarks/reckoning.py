"""The reckoning of a model: the products that it cannot do without.

Counted from the model's configuration and the windows' true lengths, not from the exported graphs, so that padding or a
needless product of a graph is charged to the graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from onetrans.bench.rates import Product, visible_pairs
from onetrans.model.config import ModelConfig

SINGLE = 4


def windows(config: ModelConfig, length: int) -> list[int]:
    """Tokens of each layer's window for a history of `length` events."""
    return [length - start for start in config.pyramid.key_starts(length)]


def decode_products(config: ModelConfig, lengths: Sequence[int], candidates: int) -> list[Product]:
    """The products of one user's decode over windows of so many tokens.

    The own block of a candidate is counted as more columns of its window, which is its cheapest shape.
    """
    _check(config)
    P, C, d, wide = config.l_ns, candidates, config.d, config.tokenizer_hidden
    known = sum(feature.embedded_dim for feature in config.schema.candidate)
    found = [*_mlp("tokenizer", C, known, wide, P * d)]
    for layer, window in enumerate(lengths):
        found.append(Product(name=f"{layer} qkv", batch=P, rows=C, inner=d, columns=3 * d))
        found += _attention(config, layer, C * P, window + P)
        found += _after_attention(config, layer, P, C)
    pooled = d * (P if config.head_pooling == "concat" else 1)
    for task in config.tasks:
        found += _mlp(task, C, pooled, config.head_hidden, 1)
    return found


def prefill_products(config: ModelConfig, lengths: Sequence[int], *, visible_only: bool) -> list[Product]:
    """The products of one user's prefill; a layer queries as many tokens as enter the next, and the last layer none.

    Args:
        config: As for `decode_products`.
        lengths: Tokens of each layer's window.
        visible_only: Count causal attention's visible pairs alone, as a rectangle of that area; otherwise all pairs of
            queries and window.
    """
    queried = zip(lengths[1:], lengths, strict=False)
    seen = [round(visible_pairs(n, window) / n) if visible_only else window for n, window in queried]
    return _user_products(config, lengths, lengths[1:], seen)


def append_products(config: ModelConfig, before: int, new: int) -> list[Product]:
    """The products of an exact append of `new` events to `before`, over visible pairs alone."""
    seen = [round(visible_pairs(new, window) / new) for window in windows(config, before + new)[:-1]]
    return _user_products(config, [new] * config.layers, [new] * len(seen), seen)


def _user_products(
    config: ModelConfig, entering: Sequence[int], queries: Sequence[int], seen: Sequence[int]
) -> list[Product]:
    """What each layer does with the tokens that enter it, those that query in it, and what each of these sees."""
    _check(config)
    d, event = config.d, sum(feature.embedded_dim for feature in config.schema.event)
    user = sum(feature.embedded_dim for feature in config.schema.user)
    found = [Product(name="user features", rows=1, inner=user, columns=config.tokenizer_hidden)]
    found += _mlp("event", entering[0], event, config.event_hidden, d)
    for layer, rows in enumerate(entering):
        found.append(Product(name=f"{layer} kv", rows=rows, inner=d, columns=2 * d))
        if layer < len(queries):
            found.append(Product(name=f"{layer} q", rows=queries[layer], inner=d, columns=d))
            found += _attention(config, layer, queries[layer], seen[layer])
            found += _after_attention(config, layer, 1, queries[layer])
    return found


def _mlp(name: str, rows: int, inner: int, hidden: int, columns: int, batch: int = 1) -> Iterator[Product]:
    up = f"{name} up"
    yield Product(name=up, batch=batch, rows=rows, inner=inner, columns=hidden)
    yield Product(name=f"{name} down", batch=batch, rows=rows, inner=hidden, columns=columns, after=up)


def _attention(config: ModelConfig, layer: int, queries: int, seen: int) -> Iterator[Product]:
    H, E, name = config.heads, config.head_dim, f"{layer} scores"
    yield Product(name=name, batch=H, rows=queries, inner=E, columns=seen, weight=False)
    yield Product(name=f"{layer} values", batch=H, rows=queries, inner=seen, columns=E, weight=False, after=name)


def _after_attention(config: ModelConfig, layer: int, batch: int, rows: int) -> Iterator[Product]:
    d, name = config.d, f"{layer} o"
    up, down = _mlp(str(layer), rows, d, config.ffn_ratio * d, d, batch)
    if config.output_projection != "none":
        yield Product(name=name, batch=batch, rows=rows, inner=d, columns=d)
        up = Product(**{**vars(up), "after": name})
    yield from (up, down)


def _check(config: ModelConfig) -> None:
    counted = config.tokenizer == "auto_split" and config.output_projection != "shared" and not config.gated
    assert counted, "the floor is counted for auto-split tokens, mixed projections and plain feed-forwards"


def decode_pointwise_bytes(config: ModelConfig, lengths: Sequence[int], candidates: int) -> int:
    """Bytes that decode in float32 moves between its products, each step reading and writing once.

    Per layer and token, in widths of d: two norms 4, the cut of QKV and its head-major form 12, the head-major result
    back 2, two residuals 6, the activation 2 × ratio; per score: joining, masking and softmax, 6 in all.
    """
    tokens = config.l_ns * candidates
    wide = (4 + 12 + 2 + 6 + 2 * config.ffn_ratio) * config.d * tokens
    scores = sum(6 * config.heads * tokens * (window + config.l_ns) for window in lengths)
    return SINGLE * (wide * len(lengths) + scores)


def prefill_pointwise_bytes(config: ModelConfig, lengths: Sequence[int]) -> int:
    """Bytes that prefill in float32 moves between its products.

    Per layer, in widths of d: a window's token: norm 2, cut of KV 4, head-major form 4; a queried token: its
    selection 2, two norms 4, head-major form and back 4, two residuals 6, the activation 2 × ratio; per score: mask and
    softmax 4.
    """
    total = sum(10 * config.d * window for window in lengths)
    for window, queries in itertools.pairwise(lengths):
        total += (16 + 2 * config.ffn_ratio) * config.d * queries + 4 * config.heads * queries * window
    return SINGLE * total
