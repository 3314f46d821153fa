"""The optimisers: Adagrad with sparse gradients for the embedding tables, one of choice for the rest."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer

from onetrans.model.onetrans import OneTrans


class Optimizers:
    """Both optimisers of a model, and their learning rates over time."""

    def __init__(
        self,
        model: OneTrans,
        *,
        dense: str,
        dense_lr: float,
        embedding_lr: float,
        weight_decay: float,
        warmup: int,
        steps: int,
    ) -> None:
        tables = list(model.embeddings.tables.parameters())
        for table in model.embeddings.tables.values():
            assert isinstance(table, nn.Embedding)
            table.sparse = True
        taken = {id(table) for table in tables}
        self.dense_parameters = [p for p in model.parameters() if id(p) not in taken]
        self._warmup, self._steps = warmup, steps
        self.dense: Optimizer
        if dense == "adam":
            self.dense = torch.optim.AdamW(
                self.dense_parameters, lr=dense_lr, weight_decay=weight_decay, betas=(0.9, 0.98)
            )
        else:
            self.dense = torch.optim.RMSprop(self.dense_parameters, lr=dense_lr, alpha=0.99, weight_decay=weight_decay)
        self.embedding = torch.optim.Adagrad(tables, lr=embedding_lr, initial_accumulator_value=0.0)
        self._rates = {"dense": dense_lr, "embedding": embedding_lr}

    def named(self) -> dict[str, Optimizer]:
        """Both, by name."""
        return {"dense": self.dense, "embedding": self.embedding}

    def rate(self, step: int) -> float:
        """Factor of both learning rates at a step: up over the warm-up, then down a half cosine to 5%."""
        up = min(1.0, (step + 1) / max(1, self._warmup))
        done = min(1.0, max(0.0, (step - self._warmup) / max(1, self._steps - self._warmup)))
        return up * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))

    def step(self, step: int, *, clip: float) -> None:
        """Applies the gradients of one step and clears them; those of dense weights are clipped to a norm."""
        nn.utils.clip_grad_norm_(self.dense_parameters, clip)
        factor = self.rate(step)
        for name, optimizer in self.named().items():
            for group in optimizer.param_groups:
                group["lr"] = self._rates[name] * factor
            with torch.sparse.check_sparse_tensor_invariants(enable=False):  # said aloud, or torch warns
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, torch.Tensor]:
        """The state of both as named tensors: `<optimiser>.<parameter>.<value>`."""
        return {
            f"{name}.{index}.{key}": torch.as_tensor(value).detach().cpu().contiguous()
            for name, optimizer in self.named().items()
            for index, values in optimizer.state_dict()["state"].items()
            for key, value in values.items()
        }

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes back what `state` gave."""
        for name, optimizer in self.named().items():
            state: dict[int, dict[str, torch.Tensor]] = {}
            for path, tensor in tensors.items():
                owner, index, key = path.split(".")
                if owner == name:
                    state.setdefault(int(index), {})[key] = tensor
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
