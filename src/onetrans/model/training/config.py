"""The training run's configuration, and that of the log it generates where none is given."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from onetrans.errors import ConfigError
from onetrans.features.logs import Logs
from onetrans.features.synthetic.logs import generate, log_schema
from onetrans.model.config import ModelConfig

CHOICES: dict[str, tuple[str, ...]] = {
    "dense_optimizer": ("adam", "rmsprop"),
    "precision": ("fp32", "bf16"),
    "device": ("cpu", "cuda"),
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Attributes:
        batch_requests: Requests in a step; the candidates of a request share its history's one pass.
        epochs: Passes over the training requests; a fraction stops early.
        steps: Steps in all; 0 takes them from `epochs`.
        train_fraction: Share of the requests, the earliest, to train on; the rest is held out.
        dense_optimizer: `adam` (default: reaches a higher AUC in a short run), or the paper's `rmsprop` (lr 0.005).
        dense_lr: Peak learning rate of all but the embedding tables.
        embedding_lr: Peak learning rate of Adagrad on the embedding tables.
        weight_decay: Weight decay of the dense optimiser.
        warmup: Steps of linear warm-up; a half cosine to 5% follows.
        clip: Largest norm of the dense gradients.
        cvr_weight: Weight of every task's loss beside CTR's.
        seed: Seed of the initial weights and of the order of the batches.
        precision: `fp32`, or `bf16`: autocast over float32 weights.
        recompute: Keep each layer's inputs alone and run it again in the backward pass: less memory, more time.
        checkpoint_every: Steps between checkpoints that a killed run can resume from.
        device: `cpu` or `cuda`.
        threads: CPU threads; 0 leaves torch's choice. One by default: the weights then do not depend on the number of
            cores, and a small model gains little from a second (a step of the tiny preset takes 86 ms on one, 62 ms on
            two that are idle, and up to 600 ms on two that other programs want as well).
    """

    batch_requests: int = 32
    epochs: float = 1.0
    steps: int = 0
    train_fraction: float = 0.9
    dense_optimizer: str = "adam"
    dense_lr: float = 1.5e-3
    embedding_lr: float = 0.1
    weight_decay: float = 0.0
    warmup: int = 50
    clip: float = 1.0
    cvr_weight: float = 0.3
    seed: int = 0
    precision: str = "fp32"
    recompute: bool = False
    checkpoint_every: int = 100
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ConfigError(f"training {field} is {getattr(self, field)!r}; allowed: {', '.join(allowed)}")
        for field in ("batch_requests", "checkpoint_every"):
            if getattr(self, field) < 1:
                raise ConfigError(f"training {field} is {getattr(self, field)}; it must be at least 1")
        for field in ("epochs", "dense_lr", "embedding_lr", "clip"):
            if not 0 < getattr(self, field) < float("inf"):
                raise ConfigError(f"training {field} is {getattr(self, field)}; it must be positive")
        for field in ("steps", "weight_decay", "warmup", "cvr_weight", "seed", "threads"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise ConfigError(f"training {field} is {getattr(self, field)}; it must not be negative")
        if not 0 < self.train_fraction < 1:
            raise ConfigError(f"training train_fraction is {self.train_fraction}; it must lie between 0 and 1")

    def to_json(self) -> dict[str, Any]:
        """Plain data for records."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Size of the log that is generated where none is given.

    Attributes:
        users: Users of the log.
        requests_per_user: Requests of each.
        candidates_per_request: Candidates shown in each.
        seed: Seed of the generator.
    """

    users: int = 1500
    requests_per_user: int = 20
    candidates_per_request: int = 20
    seed: int = 0

    def logs(self, model: ModelConfig) -> Logs:
        """Generates the log under a model's schema.

        Raises:
            ConfigError: A size is too small, or the schema is not of the synthetic kind.
        """
        known, wanted = ([(p, f.name, f.kind) for p, f in s.features()] for s in (log_schema(), model.schema))
        if wanted != known:
            raise ConfigError("a synthetic log has features of its own, not those of this configuration; give --data")
        return generate(
            users=self.users,
            requests_per_user=self.requests_per_user,
            candidates_per_request=self.candidates_per_request,
            seed=self.seed,
            schema=model.schema,
        )
