"""How a synthetic log comes about: steps of browsing, being shown candidates, and clicking."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onetrans.features.columns import Columns
from onetrans.features.logs import Events, Impressions, Logs
from onetrans.features.schema import Feature, FeatureSchema
from onetrans.features.synthetic.world import Floats, Ints, World

BEHAVIOURS = ("purchase", "cart", "click")
PURCHASE, CART, CLICK = range(3)
DAY = 86_400
EPOCH = 1_700_006_400  # midnight, UTC
FOUND_BEHAVIOURS = (0.05, 0.12, 0.83)  # of the events beside the requests
CLICK_RATE, CONVERSION_RATE, CART_RATE = 0.15, 0.15, 0.25


@dataclass(frozen=True, kw_only=True, eq=False)
class Simulation:
    """Logs, and what no log knows.

    Attributes:
        logs: What was recorded.
        click_probability: Probability of a click on each impression, float64 [n].
        conversion_probability: Probability of a conversion of each impression, given a click, float64 [n].
    """

    logs: Logs
    click_probability: Floats
    conversion_probability: Floats


class Run:
    """One simulation: its world, and what has been recorded so far."""

    def __init__(self, world: World, features: dict[str, Feature]) -> None:
        rng, users, items = world.rng, len(world.taste), len(world.category)
        self.world, self.rng, self.features = world, rng, features
        self.signup = EPOCH - 10 * DAY - rng.exponential(200 * DAY, users).astype(np.int64)
        self.interests = self._hints(users, features["interests"].width)
        self.tags = self._tags(items, features["tags"])
        self.counts = np.zeros(items)
        self.bias: tuple[float, float] | None = None
        self.events: list[Columns] = []
        self.fresh: list[Ints] = []
        self.rows: list[Columns] = []

    def browse(self, user: Ints, *, after: Ints, before: Ints) -> None:
        """Events beside the requests: of `user` (sorted), each at a time between its user's bounds."""
        share = self.rng.random(len(user))
        time = (after[user] + share * (before - after)[user]).astype(np.int64)
        item = self.world.draw_liked(user, self.world.interests())
        behaviour = self.rng.choice(len(BEHAVIOURS), size=len(user), p=FOUND_BEHAVIOURS)
        self._record(user, time[np.lexsort((time, user))], behaviour, item)
        self._click(user, item)

    def ask(self, now: Ints, *, first_request: int, candidates: int) -> None:
        """One request per user: candidates, clicks, and the events that follow from them."""
        world, rng = self.world, self.rng
        interests = world.interests()
        user, place = np.arange(len(now))[:, None], np.arange(1, candidates + 1)
        item = self._candidates(len(now), candidates, interests)
        interest, price_fit = world.interest(user, item, interests), world.price_fit(user, item)
        wish = 0.6 * interest + 0.2 * world.appeal(item) + 0.5 * price_fit + 2.0 * world.momentum(user, item)
        wish += 0.4 * world.hour_fit(item, (now // 3600 % 24)[:, None]) - 0.3 * np.log(place)
        want = 1.2 * price_fit + 0.6 * interest
        if self.bias is None:
            click_bias = _bias(wish, np.ones_like(wish), CLICK_RATE)
            self.bias = (click_bias, _bias(want, _sigmoid(wish + click_bias), CONVERSION_RATE))
        p_click, p_conversion = _sigmoid(wish + self.bias[0]), _sigmoid(want + self.bias[1])
        click = rng.random(item.shape) < p_click
        conversion = click & (rng.random(item.shape) < p_conversion)
        cart = conversion | (click & (rng.random(item.shape) < CART_RATE))
        row = {
            "request_id": first_request + user,
            "user_id": user,
            "timestamp": now[:, None],
            "item": item,
            "position": np.minimum(place, self.features["position"].vocab - 1),
            "popularity": np.log1p(self.counts[item]) / 4,
            "click": click,
            "conversion": conversion,
            "p_click": p_click,
            "p_conversion": p_conversion,
        }
        self.rows.append({name: np.broadcast_to(column, item.shape).reshape(-1) for name, column in row.items()})
        for behaviour, done, delay in ((CLICK, click, 0), (CART, cart, 2), (PURCHASE, conversion, 4)):
            who, where = np.nonzero(done)
            self._record(who, now[who] + 5 * place[where] + delay, np.full(len(who), behaviour), item[who, where])
        who, where = np.nonzero(click)
        self._click(who, item[who, where])

    def settle(self) -> None:
        """Ends a step: its clicks enter the counts, which fade. Requests see only counts of steps before theirs."""
        self.counts = 0.8 * self.counts + np.bincount(np.concatenate(self.fresh), minlength=len(self.counts))
        self.fresh = []

    def finish(self, schema: FeatureSchema) -> Simulation:
        """Everything recorded, as logs."""
        world = self.world
        events, rows = _concatenated(self.events), _concatenated(self.rows)
        events = {name: column[np.argsort(events["timestamp"], kind="stable")] for name, column in events.items()}
        user, item, time = rows["user_id"], rows["item"], rows["timestamp"]
        logs = Logs(
            schema=schema,
            events=Events(
                user_id=events["user_id"],
                timestamp=events["timestamp"],
                behaviour=events["behaviour"],
                features=self._facts(events["item"]),
            ),
            impressions=Impressions(
                request_id=rows["request_id"],
                user_id=user,
                timestamp=time,
                user={
                    "age": world.age[user] + 1,
                    "interests": self.interests[user],
                    "days_active": np.log1p((time - self.signup[user]) / DAY) / 5,
                    "hour": time // 3600 % 24 + 1,
                },
                candidate=self._facts(item)
                | {"tags": self.tags[item], "popularity": rows["popularity"], "position": rows["position"]},
                click=rows["click"].astype(np.int8),
                conversion=rows["conversion"].astype(np.int8),
            ),
        )
        return Simulation(logs=logs, click_probability=rows["p_click"], conversion_probability=rows["p_conversion"])

    def _record(self, user: Ints, time: Ints, behaviour: Ints, item: Ints) -> None:
        self.events.append({"user_id": user, "timestamp": time, "behaviour": behaviour, "item": item})

    def _click(self, user: Ints, item: Ints) -> None:
        self.world.remember(user, item)
        self.fresh.append(item)

    def _facts(self, item: Ints) -> Columns:
        return {"item_id": item + 1, "category": self.world.category[item] + 1, "price": self.world.price[item]}

    def _candidates(self, users: int, count: int, interests: Floats) -> Ints:
        """Distinct items per user [users, count]: three in ten popular, four of the user's topics, three random."""
        world, rng, items = self.world, self.rng, len(self.counts)
        size = users * count
        source = rng.random(size)
        topics = world.draw_topics(np.repeat(interests, count, axis=0))
        liked, popular = world.draw_items(topics, size), world.draw_items(None, size)
        drawn = np.where(source < 0.3, popular, np.where(source < 0.7, liked, rng.integers(items, size=size)))
        shown: Ints = drawn.reshape(users, count)
        while True:
            order = np.argsort(shown, axis=1, kind="stable")
            ranked = np.take_along_axis(shown, order, axis=1)
            who, which = np.nonzero(ranked[:, 1:] == ranked[:, :-1])
            if not len(who):
                return shown
            shown[who, order[who, which + 1]] = rng.integers(items, size=len(who))

    def _hints(self, users: int, width: int) -> Ints:
        """Categories that a user once named [users, width]: half of them true of the long run, some left out."""
        rng, topic_of = self.rng, self.world.topic_of
        topics = self.world.draw_topics(np.repeat(self.world.interests(long_run=True), width, axis=0))
        per_topic = np.bincount(topic_of, minlength=self.world.topics)[topics]
        true = topics + self.world.topics * rng.integers(per_topic)
        kind = rng.random(users * width)
        named = np.where(kind < 0.5, true + 1, np.where(kind < 0.8, rng.integers(1, len(topic_of) + 1, len(kind)), 0))
        return -np.sort(-named.reshape(users, width), axis=1)

    def _tags(self, items: int, tags: Feature) -> Ints:
        """One to `width` tags per item [items, width], most of them typical of its category."""
        rng, known = self.rng, tags.vocab - 1
        typical = (4 * self.world.category[:, None] + rng.integers(4, size=(items, tags.width))) % known
        drawn = np.where(rng.random(typical.shape) < 0.7, typical, rng.integers(known, size=typical.shape)) + 1
        return np.where(np.arange(tags.width) < rng.integers(1, tags.width + 1, size=(items, 1)), drawn, 0)


def _concatenated(parts: list[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _sigmoid(logits: Floats) -> Floats:
    chances: Floats = 1.0 / (1.0 + np.exp(-logits))
    return chances


def _bias(logits: Floats, weights: Floats, rate: float) -> float:
    """The bias at which the weighted mean probability is `rate`, by bisection."""
    low, high = -20.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        above = np.average(_sigmoid(logits + middle), weights=weights) > rate
        low, high = (low, middle) if above else (middle, high)
    return low
