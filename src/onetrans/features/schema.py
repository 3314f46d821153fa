"""The feature schema: which features a model reads, of which kind, and when each is known.

The schema is the one declaration that the training data, the model's inputs, the exported graphs and the serving
runtime share. It needs numpy alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from onetrans.errors import ConfigError

Kind = Literal["categorical", "numeric", "multi"]
Part = Literal["event", "user", "candidate"]

KINDS: tuple[Kind, ...] = ("categorical", "numeric", "multi")
PARTS: tuple[Part, ...] = ("event", "user", "candidate")
RESERVED_NAMES = ("behaviour", "timestamp")


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One feature of an event, of the user (profile and request context), or of a candidate.

    Attributes:
        name: Unique within its part.
        kind: `categorical` (one id), `numeric` (one finite float) or `multi` (up to `width` ids, mean-pooled).
        vocab: Ids run from 0 to vocab - 1; id 0 means unknown, and pads `multi`. Zero for `numeric`.
        dim: Width of the embedding. Zero for `numeric`, which enters as itself.
        table: Embedding table; features that name the same table share it. Defaults to the feature's name.
        width: Most values of a `multi` feature. Zero for other kinds.
        group: Group of the group-wise NS tokenizer; unused by the auto-split one and by events.
    """

    name: str
    kind: Kind
    vocab: int = 0
    dim: int = 0
    table: str = ""
    width: int = 0
    group: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ConfigError(f"feature name {self.name!r} is not an identifier (letters, digits, underscore)")
        for field in ("vocab", "dim", "width"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"feature {self.name}: {field} is {value!r}; it must be a whole number from 0")
        if self.name in RESERVED_NAMES:
            raise ConfigError(f"feature name {self.name!r} is reserved; rename the feature")
        if self.kind not in KINDS:
            raise ConfigError(f"feature {self.name}: kind {self.kind!r} is not one of {', '.join(KINDS)}")
        embedded = self.kind != "numeric"
        if embedded and (self.vocab < 2 or self.dim < 1):
            raise ConfigError(f"feature {self.name}: {self.kind} needs vocab >= 2 and dim >= 1")
        if not embedded and (self.vocab or self.dim or self.table):
            raise ConfigError(f"feature {self.name}: numeric takes no vocab, dim or table")
        if (self.kind == "multi") != (self.width > 0):
            raise ConfigError(f"feature {self.name}: width must be positive for multi, and absent for other kinds")
        if embedded and not self.table:
            object.__setattr__(self, "table", self.name)

    @property
    def embedded_dim(self) -> int:
        """Width that the feature adds to the concatenation it enters."""
        return 1 if self.kind == "numeric" else self.dim


@dataclass(frozen=True, kw_only=True)
class FeatureSchema:
    """All features of a model.

    Attributes:
        behaviours: Kinds of events, strongest intent first (`purchase`, `cart`, `click`); the intent-ordered merge
            concatenates them in this order.
        event: Features of each event of the history (user scope).
        user: Profile and request context (user scope).
        candidate: Features of each candidate (candidate scope).
    """

    behaviours: tuple[str, ...]
    event: tuple[Feature, ...]
    user: tuple[Feature, ...]
    candidate: tuple[Feature, ...]

    def __post_init__(self) -> None:
        names = self.behaviours
        if not names or len(set(names)) != len(names) or not all(isinstance(name, str) and name for name in names):
            raise ConfigError(f"behaviours {names} must be distinct words, at least one")
        for part in PARTS:
            features: tuple[Feature, ...] = getattr(self, part)
            if not features:
                raise ConfigError(f"the schema has no {part} feature; it needs at least one")
            given = [feature.name for feature in features]
            twice = {name for name in given if given.count(name) > 1}
            if twice:
                raise ConfigError(f"the schema names {part} feature {', '.join(sorted(twice))} twice")
        sizes: dict[str, tuple[int, int]] = {}
        for part, feature in self.features():
            if feature.kind == "numeric":
                continue
            size = sizes.setdefault(feature.table, (feature.vocab, feature.dim))
            if size != (feature.vocab, feature.dim):
                raise ConfigError(
                    f"{part} feature {feature.name} shares table {feature.table!r} of vocab and dim {size}"
                    f" but states {(feature.vocab, feature.dim)}; make them equal or name another table"
                )

    def features(self) -> Iterator[tuple[Part, Feature]]:
        """Every feature with its part, in declaration order."""
        for part in PARTS:
            for feature in getattr(self, part):
                yield part, feature

    def tables(self) -> dict[str, tuple[int, int]]:
        """Embedding tables: name to (vocab, dim)."""
        return {f.table: (f.vocab, f.dim) for _, f in self.features() if f.kind != "numeric"}

    def to_json(self) -> dict[str, Any]:
        """Plain data for a manifest or a config file."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FeatureSchema:
        """Reads what `to_json` wrote.

        Raises:
            ConfigError: A field is missing, unknown or of a value that cannot be.
        """
        try:
            parts = {part: tuple(Feature(**feature) for feature in data[part]) for part in PARTS}
            unknown = set(data) - {"behaviours", *PARTS}
            if unknown:
                raise ConfigError(f"unknown field in the feature schema: {', '.join(sorted(unknown))}")
            if isinstance(data["behaviours"], str):
                raise ConfigError(f"behaviours is {data['behaviours']!r}; give a list of words")
            return cls(behaviours=tuple(data["behaviours"]), **parts)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"the feature schema cannot be read: {error}") from error
