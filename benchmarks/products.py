"""The matrix products that a request cannot do without, with their shapes: the floor under prefill and decode.

Counted from the model's configuration and the windows' true lengths, not from the exported graphs, so that padding or a
needless product of a graph is charged to the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from onetrans.model.config import ModelConfig

BYTES = 4  # float32


@dataclass(frozen=True, kw_only=True)
class Product:
    """`batch` products [rows, inner] @ [inner, columns].

    Attributes:
        name: What it computes.
        weight: Whether the right side is a constant of the model; otherwise it is an activation or part of the state.
        after: Name of the product whose result is the left side, where nothing but pointwise work lies between.
    """

    name: str
    batch: int
    rows: int
    inner: int
    columns: int
    weight: bool
    after: str | None = None

    @property
    def left(self) -> tuple[int, int, int]:
        """Shape of the left side."""
        return self.batch, self.rows, self.inner

    @property
    def right(self) -> tuple[int, int, int]:
        """Shape of the right side."""
        return self.batch, self.inner, self.columns

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.batch * self.rows * self.inner * self.columns

    @property
    def bytes(self) -> int:
        """Both sides read once and the result written once."""
        return BYTES * self.batch * (self.rows * self.inner + self.inner * self.columns + self.rows * self.columns)


def decode_products(config: ModelConfig, *, lengths: Sequence[int], candidates: int) -> list[Product]:
    """The products of one user's decode.

    The own block of a candidate is counted as more columns of its window, which is its cheapest shape.

    Args:
        config: With the auto-split tokenizer, mixed or no output projection, and no gate.
        lengths: Tokens of each layer's window.
        candidates: C.
    """
    _check(config)
    P, C, H, d = config.l_ns, candidates, config.heads, config.d
    known = sum(feature.embedded_dim for feature in config.schema.candidate)
    found = [
        Product(name="tokenizer up", batch=1, rows=C, inner=known, columns=config.tokenizer_hidden, weight=True),
        Product(
            name="tokenizer down",
            batch=1,
            rows=C,
            inner=config.tokenizer_hidden,
            columns=P * d,
            weight=True,
            after="tokenizer up",
        ),
    ]
    for layer, window in enumerate(lengths):
        found.append(Product(name=f"{layer} qkv", batch=P, rows=C, inner=d, columns=3 * d, weight=True))
        found += _attention(layer, H, C * P, window + P, config.head_dim)
        found += _after_attention(config, layer, P, C)
    wide = d * (P if config.head_pooling == "concat" else 1)
    for task in config.tasks:
        up, down = f"{task} up", f"{task} down"
        found.append(Product(name=up, batch=1, rows=C, inner=wide, columns=config.head_hidden, weight=True))
        found.append(Product(name=down, batch=1, rows=C, inner=config.head_hidden, columns=1, weight=True, after=up))
    return found


def prefill_products(config: ModelConfig, *, lengths: Sequence[int], visible_only: bool) -> list[Product]:
    """The products of one user's prefill.

    Args:
        config: As for `decode_products`.
        lengths: Tokens of each layer's window; a layer queries as many as enter the next, and the last layer none.
        visible_only: Count causal attention's visible pairs alone, as a rectangle of that area; otherwise all pairs of
            queries and window.
    """
    _check(config)
    d, wide = config.d, sum(feature.embedded_dim for feature in config.schema.event)
    user = sum(feature.embedded_dim for feature in config.schema.user)
    found = [
        Product(name="user features", batch=1, rows=1, inner=user, columns=config.tokenizer_hidden, weight=True),
        Product(name="event up", batch=1, rows=lengths[0], inner=wide, columns=config.event_hidden, weight=True),
        Product(
            name="event down",
            batch=1,
            rows=lengths[0],
            inner=config.event_hidden,
            columns=d,
            weight=True,
            after="event up",
        ),
    ]
    for layer, window in enumerate(lengths):
        found.append(Product(name=f"{layer} kv", batch=1, rows=window, inner=d, columns=2 * d, weight=True))
        if layer + 1 == len(lengths):
            break
        queries = lengths[layer + 1]
        seen = round(visible_pairs(queries, window) / queries) if visible_only else window
        found.append(Product(name=f"{layer} q", batch=1, rows=queries, inner=d, columns=d, weight=True))
        found += _attention(layer, config.heads, queries, seen, config.head_dim)
        found += _after_attention(config, layer, 1, queries)
    return found


def visible_pairs(queries: int, window: int) -> int:
    """Pairs of the last `queries` tokens of a window and the tokens that each sees, itself included."""
    first = window - queries + 1
    return queries * (first + window) // 2


def total_flops(products: Sequence[Product]) -> int:
    """Of all products."""
    return sum(product.flops for product in products)


def total_bytes(products: Sequence[Product]) -> int:
    """Read and written by all products."""
    return sum(product.bytes for product in products)


def _attention(layer: int, heads: int, queries: int, seen: int, head_dim: int) -> Iterator[Product]:
    name = f"{layer} scores"
    yield Product(name=name, batch=heads, rows=queries, inner=head_dim, columns=seen, weight=False)
    yield Product(
        name=f"{layer} values", batch=heads, rows=queries, inner=seen, columns=head_dim, weight=False, after=name
    )


def _after_attention(config: ModelConfig, layer: int, batch: int, rows: int) -> Iterator[Product]:
    d, hidden = config.d, config.ffn_ratio * config.d
    projection = f"{layer} o"
    if config.output_projection != "none":
        yield Product(name=projection, batch=batch, rows=rows, inner=d, columns=d, weight=True)
    up = f"{layer} up"
    after = None if config.output_projection == "none" else projection
    yield Product(name=up, batch=batch, rows=rows, inner=d, columns=hidden, weight=True, after=after)
    yield Product(name=f"{layer} down", batch=batch, rows=rows, inner=hidden, columns=d, weight=True, after=up)


def _check(config: ModelConfig) -> None:
    counted = config.tokenizer == "auto_split" and config.output_projection != "shared" and not config.gated
    assert counted, "the floor is counted for auto-split tokens, mixed projections and plain feed-forwards"
