"""The model's configuration: everything that arXiv 2510.26104 leaves open is a field with a documented default."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from onetrans.errors import ConfigError
from onetrans.features.schema import Feature, FeatureSchema
from onetrans.features.windows import Pyramid

CHOICES: dict[str, tuple[str, ...]] = {
    "merge": ("time", "intent"),
    "event_mlp": ("shared", "per_behaviour"),
    "tokenizer": ("auto_split", "group_wise"),
    "activation": ("gelu", "silu", "relu"),
    "norm_gain": ("shared", "per_token"),
    "output_projection": ("mixed", "shared", "none"),
    "positions": ("none", "sinusoidal"),
    "schedule": ("linear", "linear_shrunk", "none", "explicit"),
    "head_pooling": ("mean", "last", "concat"),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One OneTrans model.

    Attributes:
        name: A word for records and manifests.
        schema: The features.
        merge: `time` interleaves behaviours by timestamp (default); `intent` concatenates them with [SEP].
        event_mlp: One MLP for all events (default), or one per behaviour.
        event_hidden: Hidden width of the event MLP.
        tokenizer: `auto_split` (default): one MLP over all NS features, split; `group_wise`: one MLP per group.
        tokenizer_hidden: Hidden width of the NS tokenizer's MLPs.
        l_ns: NS-tokens. With `group_wise`, the number of groups.
        d: Model width.
        heads: Attention heads; d is a multiple.
        layers: Blocks.
        ffn_ratio: Feed-forward width over d.
        activation: Activation of feed-forwards and MLPs.
        gated: Gated feed-forward (activation(gate) times value).
        bias: Biases in the blocks' projections.
        norm_gain: One RMSNorm gain per layer for all tokens (default), or one for S and one per NS position.
        output_projection: W_O: per NS position and one for S (default), one for all tokens, or none.
        eps: Added to the mean square in RMSNorm.
        positions: None (default; the paper names only the type indicator), or sinusoidal from the history's start.
        max_history: Most S-tokens that a fresh window holds at an anchor (keep_0).
        append_chunk: Chunk c of the anchored windows; 1 is the paper's sliding tail.
        schedule: How the pyramid shrinks: `linear` (first layer full), `linear_shrunk` (shrunk from the first layer),
            `none`, or `explicit`.
        explicit_keep: Queried S-tokens per layer for `explicit`.
        head_pooling: What the heads read of the NS-tokens after the final norm.
        head_hidden: Hidden width of each task head.
        tasks: Heads, each a logit per candidate.
    """

    name: str
    schema: FeatureSchema
    merge: str = "time"
    event_mlp: str = "shared"
    event_hidden: int
    tokenizer: str = "auto_split"
    tokenizer_hidden: int
    l_ns: int
    d: int
    heads: int
    layers: int
    ffn_ratio: int = 4
    activation: str = "gelu"
    gated: bool = False
    bias: bool = False
    norm_gain: str = "shared"
    output_projection: str = "mixed"
    eps: float = 1e-6
    positions: str = "none"
    max_history: int
    append_chunk: int = 64
    schedule: str = "linear"
    explicit_keep: tuple[int, ...] = ()
    head_pooling: str = "mean"
    head_hidden: int
    tasks: tuple[str, ...] = ("ctr", "cvr")

    def __post_init__(self) -> None:
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ConfigError(f"config {field} is {getattr(self, field)!r}; allowed: {', '.join(allowed)}")
        sizes = ("event_hidden", "tokenizer_hidden", "l_ns", "d", "heads", "layers", "ffn_ratio", "head_hidden")
        for field in (*sizes, "max_history", "append_chunk"):
            if getattr(self, field) < 1:
                raise ConfigError(f"config {field} is {getattr(self, field)}; it must be at least 1")
        if self.d % self.heads:
            raise ConfigError(f"config d is {self.d}, which {self.heads} heads do not divide")
        if not 0 < self.eps < 1:
            raise ConfigError(f"config eps is {self.eps}; it must lie between 0 and 1")
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ConfigError(f"config tasks {self.tasks} must be distinct and at least one")
        if (self.schedule == "explicit") != bool(self.explicit_keep):
            raise ConfigError("config explicit_keep goes with schedule 'explicit', and only with it")
        keep = self.keep
        if len(keep) != self.layers:
            raise ConfigError(f"config explicit_keep has {len(keep)} entries for {self.layers} layers")
        if any(a < b for a, b in zip((self.max_history, *keep), keep, strict=False)) or keep[-1] < 1:
            raise ConfigError(f"config keep {keep} must not grow from layer to layer, from max_history to at least 1")
        if self.tokenizer == "group_wise" and self.l_ns != len(self.groups()):
            raise ConfigError(f"config l_ns is {self.l_ns}, but the schema has {len(self.groups())} NS groups")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.d // self.heads

    @property
    def keep(self) -> tuple[int, ...]:
        """S-tokens that each layer queries, counted from the anchor (arXiv 2510.26104, section 3.4)."""
        if self.schedule == "explicit":
            return self.explicit_keep
        if self.schedule == "none":
            return (self.max_history,) * self.layers
        top = min(self.l_ns, self.max_history)
        steps = self.layers if self.schedule == "linear_shrunk" else max(1, self.layers - 1)
        first = 1 if self.schedule == "linear_shrunk" else 0
        exact = [self.max_history + (top - self.max_history) * (i + first) / steps for i in range(self.layers)]
        rounded = [min(self.max_history, max(top, 32 * round(k / 32))) for k in exact]
        if self.schedule == "linear":
            rounded[0] = self.max_history
        rounded[-1] = top if self.layers > 1 or first else self.max_history
        return tuple(rounded)

    @property
    def pyramid(self) -> Pyramid:
        """The windows of every layer."""
        return Pyramid(max_history=self.max_history, keep=self.keep, chunk=self.append_chunk)

    def groups(self) -> tuple[tuple[str, str, tuple[Feature, ...]], ...]:
        """NS groups for the group-wise tokenizer: (name, scope, features), user-scope groups first.

        Raises:
            ConfigError: A group is unnamed or mixes user and candidate features.
        """
        found: dict[str, tuple[str, list[Feature]]] = {}
        for part in ("user", "candidate"):
            for feature in getattr(self.schema, part):
                if not feature.group:
                    raise ConfigError(f"{part} feature {feature.name} has no group; group_wise tokens need one")
                scope, members = found.setdefault(feature.group, (part, []))
                if scope != part:
                    raise ConfigError(f"group {feature.group!r} mixes user and candidate features; split it")
                members.append(feature)
        return tuple((name, scope, tuple(members)) for name, (scope, members) in found.items())

    @property
    def user_tokens(self) -> int:
        """NS-tokens that never see a candidate: the user-scope groups."""
        return sum(scope == "user" for _, scope, _ in self.groups()) if self.tokenizer == "group_wise" else 0

    def to_json(self) -> dict[str, Any]:
        """Plain data for a config file or a manifest."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Reads what `to_json` wrote.

        Raises:
            ConfigError: A field is missing, unknown, of the wrong type, or of a value that cannot be.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = set(data) - set(fields)
        if unknown:
            raise ConfigError(f"unknown config field {', '.join(sorted(unknown))}; allowed: {', '.join(fields)}")
        missing = {n for n, f in fields.items() if f.default is dataclasses.MISSING} - set(data)
        if missing:
            raise ConfigError(f"the config lacks {', '.join(sorted(missing))}")
        values = dict(data)
        values["schema"] = FeatureSchema.from_json(values["schema"])
        hints = get_type_hints(cls)
        for name, value in values.items():
            hint = hints[name]
            if get_args(hint):
                values[name] = tuple(value)
            elif not isinstance(value, (int, float) if hint is float else hint) or (
                isinstance(value, bool) and hint is not bool
            ):
                raise ConfigError(f"config {name} is {value!r}; it must be of type {hint.__name__}")
        return cls(**values)
