"""What a killed run resumes from: weights, optimiser states and the step, in safetensors and JSON."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file

from onetrans.errors import CheckpointError, ConfigError
from onetrans.files import new_folder
from onetrans.model.checkpoint import load_checkpoint, write_checkpoint
from onetrans.model.onetrans import OneTrans
from onetrans.model.training.optimizers import Optimizers

OPTIMIZERS_FILE, STATE_FILE = "optimizers.safetensors", "state.json"


@dataclass(frozen=True, kw_only=True)
class Progressed:
    """How far a run has come.

    Attributes:
        step: Steps done.
        seconds: Spent on them, over all resumptions.
    """

    step: int
    seconds: float


def save_state(
    folder: Path, model: OneTrans, optimizers: Optimizers, done: Progressed, settings: Mapping[str, Any]
) -> None:
    """Adds the checkpoint of a step to a state folder, then drops older ones; one whole checkpoint is there always.

    Raises:
        JobError: The disk refused.
    """
    place = folder / f"step-{done.step:09d}"
    with new_folder(place) as unfinished:
        write_checkpoint(model, unfinished)
        save_file(optimizers.state(), unfinished / OPTIMIZERS_FILE)
        sha256 = hashlib.sha256((unfinished / OPTIMIZERS_FILE).read_bytes()).hexdigest()
        record = {"step": done.step, "seconds": done.seconds, "optimizers_sha256": sha256, "settings": dict(settings)}
        (unfinished / STATE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for other in folder.iterdir():
        if other != place:
            shutil.rmtree(other)


def load_state(folder: Path, model: OneTrans, optimizers: Optimizers, settings: Mapping[str, Any]) -> Progressed:
    """Puts the newest checkpoint of a state folder into a model and its optimisers.

    Args:
        folder: What `save_state` filled.
        model: A model of the run's configuration, on its device; its weights are overwritten.
        optimizers: That model's optimisers.
        settings: What must not have changed since.

    Raises:
        ConfigError: A setting differs from the unfinished run's.
        CheckpointError: The checkpoint is damaged.
    """
    newest = max(folder.glob("step-*"))
    try:
        record = json.loads((newest / STATE_FILE).read_text(encoding="utf-8"))
        before, done = record["settings"], Progressed(step=record["step"], seconds=record["seconds"])
        data = (newest / OPTIMIZERS_FILE).read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{newest} is damaged ({error!r}); remove {folder} and train from the start") from error
    for name, value in settings.items():
        if before.get(name) != json.loads(json.dumps(value)):
            raise ConfigError(
                f"cannot resume: {name} was {before.get(name)!r} in the unfinished run and is {value!r} now;"
                f" repeat the old value, or remove {folder} and train from the start"
            )
    if hashlib.sha256(data).hexdigest() != record.get("optimizers_sha256"):
        raise CheckpointError(f"{newest / OPTIMIZERS_FILE} is damaged; remove {folder} and train from the start")
    saved = load_checkpoint(newest)
    with torch.no_grad():
        for parameter, stored in zip(model.parameters(), saved.parameters(), strict=True):
            parameter.copy_(stored)
    optimizers.load(load(data))
    return done
