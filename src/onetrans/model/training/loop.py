"""The training loop: deterministic steps, checkpoints that survive a kill, and a measured result."""

from __future__ import annotations

import json
import math
import platform
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onetrans.errors import JobError, MissingDependencyError
from onetrans.features.logs import Logs
from onetrans.files import new_folder
from onetrans.model.checkpoint import weights_hash, write_checkpoint
from onetrans.model.config import ModelConfig
from onetrans.model.onetrans import OneTrans
from onetrans.model.training.config import TrainConfig
from onetrans.model.training.data import Tensors, TrainingData
from onetrans.model.training.evaluate import Report, evaluate, popularity
from onetrans.model.training.initial import initial_model
from onetrans.model.training.losses import check_tasks, task_losses
from onetrans.model.training.metrics import auc
from onetrans.model.training.optimizers import Optimizers
from onetrans.model.training.places import check_output, has_state, state_folder
from onetrans.model.training.state import Progressed, load_state, save_state

METRICS_FILE = "metrics.json"
RUNNING_STEPS = 50  # steps that the running AUC looks back


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a progress display shows after a step.

    Attributes:
        step: Steps done.
        steps: Steps in all.
        loss: Loss of this step.
        auc: AUC of CTR over the last steps' own batches, before their updates; NaN until both classes were seen.
        requests_per_second: Since the run began or resumed.
        message: Else to be said once, or empty.
    """

    step: int
    steps: int
    loss: float
    auc: float
    requests_per_second: float
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run.

    Attributes:
        output: The checkpoint's folder.
        held_out: AUC and UAUC per task.
        popularity: The same of the popularity baseline; None where the log names no items.
        steps: Steps trained.
        seconds: Spent training, over all resumptions; evaluation is left out.
        weights_sha256: Hash of the weights.
        metrics: All of `metrics.json`.
    """

    output: Path
    held_out: Report
    popularity: Report | None
    steps: int
    seconds: float
    weights_sha256: str
    metrics: Mapping[str, Any]


Progress = Callable[[StepReport], None]


def train(
    config: TrainConfig,
    model_config: ModelConfig,
    logs: Logs,
    output: str | Path,
    progress: Progress | None = None,
    *,
    resume: bool = False,
) -> TrainResult:
    """Trains a model and writes its checkpoint and `metrics.json`.

    The same configuration, log, machine and number of threads give the same weights, bit by bit, also where the run was
    killed and resumed. Until the run is finished its checkpoints lie beside `output`, which then appears at once.

    Args:
        config: The run.
        model_config: The model, of the log's schema.
        logs: What to train on and to hold out.
        output: Folder to write.
        progress: Called after every step.
        resume: Continue an unfinished run into `output`, or begin where there is none.

    Raises:
        OutputExistsError: `output` exists, or an unfinished run into it does and `resume` is not given.
        ConfigError: A setting cannot be, or differs from that of the run to resume.
        DataError: The log does not fit the model.
        CheckpointError: The checkpoint to resume from is damaged.
        MissingDependencyError: The device is absent.
        JobError: The loss became NaN or infinite, or the disk refused.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    try:
        return _train(config, model_config, logs, Path(output), progress, resume=resume)
    finally:
        torch.set_num_threads(threads)


def _train(
    config: TrainConfig,
    model_config: ModelConfig,
    logs: Logs,
    output: Path,
    progress: Progress | None,
    *,
    resume: bool,
) -> TrainResult:
    check_output(output, resume=resume)
    folder = state_folder(output)
    check_tasks(model_config.tasks)
    device = _device(config.device)
    data = TrainingData(logs, model_config, train_fraction=config.train_fraction)
    steps = config.steps or max(1, round(config.epochs * data.batches_per_epoch(config.batch_requests)))
    model = initial_model(model_config, config.seed).to(device)
    model.stack.recompute = config.recompute
    optimizers = Optimizers(
        model,
        dense=config.dense_optimizer,
        dense_lr=config.dense_lr,
        embedding_lr=config.embedding_lr,
        weight_decay=config.weight_decay,
        warmup=config.warmup,
        steps=steps,
    )
    settings = {name: value for name, value in config.to_json().items() if name != "checkpoint_every"}
    settings |= {"model": model_config.to_json(), "log": data.sha256()}
    done = Progressed(step=0, seconds=0.0)
    if resume and has_state(folder):
        done = load_state(folder, model, optimizers, settings)
    done = _run(config, model, optimizers, data, done, steps, folder, settings, progress)
    model.stack.recompute = False
    model.eval()
    held_out = evaluate(model, data, batch_requests=2 * config.batch_requests)
    metrics = {
        "model": model_config.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out": held_out,
        "popularity": popularity(data, model_config.tasks),
        "requests": {"train": len(data.train), "held_out": len(data.held_out)},
        "impressions": len(logs.impressions.click),
        "log_sha256": settings["log"],
        "steps": steps,
        "seconds": round(done.seconds, 3),
        "training": config.to_json(),
        "threads": torch.get_num_threads(),
        "versions": _versions(),
        "weights_sha256": weights_hash(model),
    }
    with new_folder(output) as unfinished:
        write_checkpoint(model, unfinished, extra={"steps": steps, "held_out": held_out, **config.to_json()})
        (unfinished / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    return _result(output, metrics)


def _run(
    config: TrainConfig,
    model: OneTrans,
    optimizers: Optimizers,
    data: TrainingData,
    done: Progressed,
    steps: int,
    folder: Path,
    settings: Mapping[str, Any],
    progress: Progress | None,
) -> Progressed:
    """All steps that are left."""
    model.train()
    device = next(model.parameters()).device
    began, first, spent = time.perf_counter(), done.step, done.seconds
    seen: deque[tuple[Any, Any]] = deque(maxlen=RUNNING_STEPS)
    for step in range(done.step, steps):
        requests = data.batch(seed=config.seed, step=step, batch_requests=config.batch_requests)
        batch = data.tensors(requests, device)
        loss, logits = _backward(config, model, batch)
        if not math.isfinite(loss):
            raise JobError(
                f"the loss became {loss} at step {step + 1} of {steps}; lower the learning rates (dense_lr"
                f" {config.dense_lr:g}, embedding_lr {config.embedding_lr:g}) or clip more ({config.clip:g})"
            )
        optimizers.step(step, clip=config.clip)
        elapsed = time.perf_counter() - began
        done = Progressed(step=step + 1, seconds=spent + elapsed)
        if done.step % config.checkpoint_every == 0 and done.step < steps:
            save_state(folder, model, optimizers, done, settings)
        if progress is not None:
            if "ctr" in logits:
                seen.append((batch.click[batch.mask].cpu().numpy(), logits["ctr"][batch.mask].cpu().numpy()))
            running = auc(*map(np.concatenate, zip(*seen, strict=True))) if seen else math.nan
            rate = (done.step - first) * config.batch_requests / elapsed
            progress(StepReport(step=done.step, steps=steps, loss=loss, auc=running, requests_per_second=rate))
    return done


def _backward(config: TrainConfig, model: OneTrans, batch: Tensors) -> tuple[float, dict[str, torch.Tensor]]:
    """Leaves the gradients of one batch; gives its loss and logits."""
    with torch.autocast(batch.mask.device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
        logits: dict[str, torch.Tensor] = model(batch.user, batch.candidate)
    losses = task_losses(logits, batch)
    weights = {task: 1.0 if task == "ctr" else config.cvr_weight for task in losses}
    loss = torch.stack([weights[task] * value for task, value in losses.items()]).sum()
    loss.backward()
    return loss.item(), {task: value.detach() for task, value in logits.items()}


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise MissingDependencyError(
            "device cuda needs an NVIDIA GPU, its driver and a CUDA build of torch, and torch finds none; use cpu"
        )
    return torch.device(name)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    try:
        return {"onetrans-export": version("onetrans-export"), **found}
    except PackageNotFoundError:
        return found


def _result(output: Path, metrics: Mapping[str, Any]) -> TrainResult:
    return TrainResult(
        output=output,
        held_out=metrics["held_out"],
        popularity=metrics["popularity"],
        steps=metrics["steps"],
        seconds=metrics["seconds"],
        weights_sha256=metrics["weights_sha256"],
        metrics=metrics,
    )
