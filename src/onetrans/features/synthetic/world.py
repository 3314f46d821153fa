"""The hidden world behind synthetic logs: interests that drift, items in and out of fashion, memories of clicks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onetrans.features.columns import Array

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

REMEMBERED = 6
MOST_TOPICS = 10


class World:
    """Users and items, and what draws one to the other. Ids run from 0 here; a log adds 1.

    Attributes:
        topic_of: Topic of each category, [categories].
        category: Category of each item, [items].
        topic: Topic of each item, [items].
        price: Standardised log price of each item, [items].
        fashion: Log weight of each item, Zipf at first and drifting, [items].
        age: Age of each user, [users].
        taste: The log price that a user likes, [users].
        activity: Events per step beside the requests, [users].
        recent: Items clicked last, the latest first, -1 for none, [users, REMEMBERED].
    """

    def __init__(self, rng: np.random.Generator, *, users: int, items: int, categories: int, ages: int) -> None:
        """Draws users and items."""
        self.rng = rng
        self.topics = min(MOST_TOPICS, categories)
        self.topic_of = np.arange(categories) % self.topics
        self.category = rng.permutation(np.arange(items) % categories)
        self.topic = self.topic_of[self.category]
        self.price = rng.normal(size=items)
        self._zipf = -np.log1p(rng.permutation(items))
        self.fashion = self._zipf + rng.normal(scale=0.5, size=items)
        self._peak_hour = rng.uniform(0, 24, size=self.topics)
        self._by_topic = np.argsort(self.topic, kind="stable")
        self._topic_ends = np.cumsum(np.bincount(self.topic, minlength=self.topics))

        self.age = rng.integers(ages, size=users)
        leaning = rng.normal(scale=0.6, size=(ages, self.topics))
        self._mean = leaning[self.age] + rng.normal(scale=1.2, size=(users, self.topics))
        self._drift = rng.normal(scale=0.9, size=(users, self.topics))
        self.taste = rng.normal(scale=0.9, size=users)
        self.activity = np.minimum(rng.lognormal(0.2, 1.2, size=users), 15.0) * (rng.random(users) > 0.1)
        self.recent = np.full((users, REMEMBERED), -1, dtype=np.int64)

    def step(self) -> None:
        """Lets interests and fashions drift: AR(1) around what they are in the long run."""
        self._drift = 0.9 * self._drift + np.sqrt(1 - 0.9**2) * self.rng.normal(scale=0.9, size=self._drift.shape)
        pull = 0.95 * (self.fashion - self._zipf)
        self.fashion = self._zipf + pull + self.rng.normal(scale=0.5 * np.sqrt(1 - 0.95**2), size=len(pull))

    def interests(self, *, long_run: bool = False) -> Floats:
        """Each user's distribution over topics, [users, topics]."""
        logits = self._mean if long_run else self._mean + self._drift
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: Floats = weights / weights.sum(axis=1, keepdims=True)
        return shares

    def draw_topics(self, interests: Floats) -> Ints:
        """One topic per row of distributions [n, topics]."""
        passed = self.rng.random((len(interests), 1)) > np.cumsum(interests, axis=1)
        topics: Ints = np.minimum(passed.sum(axis=1), self.topics - 1)
        return topics

    def draw_items(self, topics: Ints | None, size: int) -> Ints:
        """Items by fashion, within a topic each [size] or among all."""
        mass = np.cumsum(np.exp(self.fashion[self._by_topic]))
        if topics is None:
            begin, end = np.zeros(size, dtype=np.int64), np.full(size, len(mass))
        else:
            begin, end = np.concatenate([[0], self._topic_ends])[topics], self._topic_ends[topics]
        low, high = np.concatenate([[0.0], mass])[begin], mass[end - 1]
        places = np.searchsorted(mass, low + self.rng.random(size) * (high - low), side="right")
        items: Ints = self._by_topic[np.clip(places, begin, end - 1)]
        return items

    def draw_liked(self, user: Ints, interests: Floats) -> Ints:
        """Items that users find by themselves: of their topics, the nearer to their price of two."""
        topics = self.draw_topics(interests[user])
        first, second = self.draw_items(topics, len(user)), self.draw_items(topics, len(user))
        return np.where(self.price_fit(user, first) >= self.price_fit(user, second), first, second)

    def price_fit(self, user: Array, item: Array) -> Floats:
        """How well a price suits a user: 1 at best, at least -2."""
        fit: Floats = np.maximum(1.0 - 0.6 * (self.price[item] - self.taste[user]) ** 2, -2.0)
        return fit

    def interest(self, user: Array, item: Array, interests: Floats) -> Floats:
        """Log share of the item's topic over an even share, within ±2.5."""
        share: Floats = np.clip(np.log(interests[user, self.topic[item]] * self.topics), -2.5, 2.5)
        return share

    def appeal(self, item: Array) -> Floats:
        """Standardised fashion."""
        standard: Floats = (self.fashion[item] - self.fashion.mean()) / self.fashion.std()
        return standard

    def hour_fit(self, item: Array, hour: Array) -> Floats:
        """How near the hour is to the topic's peak, within ±1."""
        near: Floats = np.cos((hour - self._peak_hour[self.topic[item]]) * (2 * np.pi / 24))
        return near

    def momentum(self, user: Array, item: Array) -> Floats:
        """Likeness of an item [n, C] to what its user [n, 1] clicked last, the latest counting most, from 0 to 1."""
        recent = self.recent[user]
        decay = 0.6 ** np.arange(REMEMBERED)
        same_category = self.category[recent] == self.category[item][..., None]
        same_topic = self.topic[recent] == self.topic[item][..., None]
        alike = (0.7 * same_category + 0.3 * same_topic) * (recent >= 0)
        likeness: Floats = alike @ (decay / decay.sum())
        return likeness

    def remember(self, user: Ints, item: Ints) -> None:
        """Adds clicks, given user by user in order of time."""
        count = np.bincount(user, minlength=len(self.recent))
        behind = np.cumsum(count)[user] - 1 - np.arange(len(user))
        moved = np.arange(REMEMBERED) - np.minimum(count, REMEMBERED)[:, None]
        self.recent = np.take_along_axis(self.recent, np.maximum(moved, 0), axis=1)
        latest = behind < REMEMBERED
        self.recent[user[latest], behind[latest]] = item[latest]
