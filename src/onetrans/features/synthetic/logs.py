"""A synthetic recommender log whose clicks need the history to be understood.

A click depends on the user's drifting interests, the item's fashion, its price, the position, the hour, and on what the
user clicked last, so that both the length and the order of the history matter. Everything follows from one seed.
"""

from __future__ import annotations

import numpy as np

from onetrans.errors import ConfigError
from onetrans.features.logs import Logs
from onetrans.features.schema import Feature, FeatureSchema
from onetrans.features.synthetic.run import BEHAVIOURS, DAY, EPOCH, Run, Simulation
from onetrans.features.synthetic.world import World


def log_schema(
    *,
    items: int = 2000,
    categories: int = 50,
    tags: int = 200,
    ages: int = 8,
    hours: int = 24,
    positions: int = 50,
    item_dim: int = 32,
    category_dim: int = 16,
    tag_dim: int = 8,
    age_dim: int = 8,
    hour_dim: int = 8,
    position_dim: int = 4,
    interests_width: int = 3,
    tags_width: int = 4,
) -> FeatureSchema:
    """Schema of the synthetic logs, at any size.

    Counts are of known values; id 0 stays free for the unknown one. A position is known only in logs: serve with 0.
    """
    item, category = (items + 1, item_dim), (categories + 1, category_dim)

    def single(name: str, size: tuple[int, int], table: str = "", group: str = "") -> Feature:
        return Feature(name=name, kind="categorical", vocab=size[0], dim=size[1], table=table, group=group)

    def several(name: str, size: tuple[int, int], width: int, table: str, group: str) -> Feature:
        return Feature(name=name, kind="multi", vocab=size[0], dim=size[1], width=width, table=table, group=group)

    return FeatureSchema(
        behaviours=BEHAVIOURS,
        event=(
            single("item_id", item, "item"),
            single("category", category, "category"),
            Feature(name="price", kind="numeric"),
        ),
        user=(
            single("age", (ages + 1, age_dim), group="profile"),
            several("interests", category, interests_width, "category", "profile"),
            Feature(name="days_active", kind="numeric", group="profile"),
            single("hour", (hours + 1, hour_dim), group="context"),
        ),
        candidate=(
            single("item_id", item, "item", "item"),
            single("category", category, "category", "item"),
            several("tags", (tags + 1, tag_dim), tags_width, "tags", "item"),
            Feature(name="price", kind="numeric", group="offer"),
            Feature(name="popularity", kind="numeric", group="offer"),
            single("position", (positions + 1, position_dim), group="placement"),
        ),
    )


def generate(
    *,
    users: int = 1000,
    requests_per_user: int = 20,
    candidates_per_request: int = 10,
    items: int | None = None,
    days: float = 30.0,
    seed: int = 0,
    schema: FeatureSchema | None = None,
) -> Logs:
    """Synthetic logs; see `simulate`."""
    return simulate(
        users=users,
        requests_per_user=requests_per_user,
        candidates_per_request=candidates_per_request,
        items=items,
        days=days,
        seed=seed,
        schema=schema,
    ).logs


def simulate(
    *,
    users: int = 1000,
    requests_per_user: int = 20,
    candidates_per_request: int = 10,
    items: int | None = None,
    days: float = 30.0,
    seed: int = 0,
    schema: FeatureSchema | None = None,
) -> Simulation:
    """Simulates users who browse, are shown candidates, and click.

    Args:
        users: Users, each with `requests_per_user` requests spread over `days`.
        requests_per_user: Steps of the simulation.
        candidates_per_request: Distinct items shown per request: popular, of the user's interests, and random.
        items: Items in the catalogue; as many as the schema has room for if left out.
        days: Time that the requests span.
        seed: Seed of all that is random.
        schema: What `log_schema` gives, at the size wanted; made for `items` (2000) if left out.

    Returns:
        Logs with the true probabilities, impressions in the order of their rows.

    Raises:
        ConfigError: A size is too small, or the schema is not one of `log_schema`.
    """
    if schema is None:
        schema = log_schema(items=2000 if items is None else items)
    features = _sizes(schema)
    items = features["item_id"].vocab - 1 if items is None else items
    shown, seconds = candidates_per_request, days * DAY / max(requests_per_user, 1)
    if min(users, requests_per_user, shown) < 1:
        raise ConfigError(f"users {users}, requests {requests_per_user} and candidates {shown} must be at least 1")
    vocab = features["item_id"].vocab
    if not 2 * shown <= items < vocab:
        raise ConfigError(
            f"items {items} must be at least twice the candidates ({shown}) and below the vocab ({vocab})"
        )
    needed = 40 * shown + 600
    if seconds < needed:
        raise ConfigError(f"days {days} leave {seconds:.0f} s per request of a user; {shown} candidates need {needed}")

    rng = np.random.default_rng(seed)
    categories = min(features["category"].vocab - 1, items)
    world = World(rng, users=users, items=items, categories=categories, ages=features["age"].vocab - 1)
    run = Run(world, features)
    everyone, asked = np.arange(users), np.full(users, EPOCH)
    run.browse(np.repeat(everyone, rng.poisson(8 * world.activity)), after=asked - 10 * DAY, before=asked)
    run.settle()
    asked = asked - 5 * shown - 60
    for step in range(requests_per_user):
        now = (EPOCH + (step + rng.uniform(0.1, 0.8, users)) * seconds).astype(np.int64)
        run.browse(np.repeat(everyone, rng.poisson(world.activity)), after=asked + 5 * shown + 60, before=now)
        run.ask(now, first_request=step * users, candidates=shown)
        run.settle()
        world.step()
        asked = now
    return run.finish(schema)


def _sizes(schema: FeatureSchema) -> dict[str, Feature]:
    wanted, given = ([(p, f.name, f.kind) for p, f in s.features()] for s in (log_schema(), schema))
    if wanted != given or schema.behaviours != BEHAVIOURS:
        raise ConfigError("the schema is not one of synthetic.log_schema; call it with the sizes wanted")
    return {feature.name: feature for _, feature in schema.features()}
