"""Training: its numbers against brute force, the same weights from the same seed, kills, and what the model learns."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from onetrans.cli.train import train_command
from onetrans.errors import CheckpointError, ConfigError, DataError, JobError, MissingDependencyError, OutputExistsError
from onetrans.features.logs import Logs, read_logs
from onetrans.features.schema import Feature
from onetrans.features.synthetic.logs import log_schema
from onetrans.model.checkpoint import load_checkpoint, random_model, weights_hash
from onetrans.model.config import ModelConfig
from onetrans.model.presets import preset
from onetrans.model.training.config import SyntheticConfig, TrainConfig
from onetrans.model.training.data import TrainingData
from onetrans.model.training.evaluate import evaluate
from onetrans.model.training.loop import StepReport, TrainResult, train
from onetrans.model.training.losses import task_losses
from onetrans.model.training.places import state_folder

MODEL = ModelConfig(
    name="test",
    schema=log_schema(items=100, categories=10, tags=20, item_dim=8, category_dim=4, tag_dim=4),
    event_hidden=16,
    tokenizer_hidden=16,
    l_ns=3,
    d=16,
    heads=2,
    layers=2,
    max_history=16,
    append_chunk=4,
    head_hidden=8,
)
LOG = SyntheticConfig(users=30, requests_per_user=8, candidates_per_request=5)
RUN = TrainConfig(batch_requests=16, steps=24, warmup=4, checkpoint_every=5)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def logs() -> Logs:
    return LOG.logs(MODEL)


@pytest.fixture(scope="module")
def data(logs: Logs) -> TrainingData:
    return TrainingData(logs, MODEL, train_fraction=0.8)


def losses_of(run: TrainConfig, logs: Logs, output: Path, **kwargs: Any) -> tuple[list[float], str]:
    seen: list[StepReport] = []
    result = train(run, MODEL, logs, output, seen.append, **kwargs)
    assert [report.step for report in seen][-1] == run.steps
    return [report.loss for report in seen], result.weights_sha256


# Losses and batches


def test_losses_count_shown_and_clicked_candidates_alone(data: TrainingData) -> None:
    batch = data.tensors(data.train[:6], torch.device("cpu"))
    mask, click = batch.mask.clone(), batch.click.clone()
    mask[2, 1:] = False
    click[0] = 1.0
    batch = dataclasses.replace(batch, mask=mask, click=click * mask)
    logits = {task: torch.randn(mask.shape, generator=torch.Generator().manual_seed(3)) for task in ("ctr", "cvr")}
    found = task_losses(logits, batch)
    for task, labels, counts in (
        ("ctr", batch.click, mask),
        ("cvr", batch.conversion, mask & (batch.click > 0)),
    ):
        p = torch.sigmoid(logits[task].double())
        rows = [(u, c) for u in range(6) for c in range(mask.shape[1]) if counts[u, c]]
        each = [-(torch.log(p[r]) if labels[r] else torch.log(1 - p[r])) for r in rows]
        assert abs(found[task] - torch.stack(each).mean()) < 1e-6
    for task, value in logits.items():
        value[~mask] = 1e4  # padded candidates
        if task == "cvr":
            value[batch.click == 0] = 1e4
    assert task_losses(logits, batch)["cvr"] == found["cvr"]
    assert abs(task_losses(logits | {"ctr": logits["ctr"]}, batch)["ctr"] - found["ctr"]) < 1e-6


def test_a_batch_without_clicks_has_a_finite_loss_and_gradient(data: TrainingData) -> None:
    batch = data.tensors(data.train[:2], torch.device("cpu"))
    none = torch.zeros_like(batch.click)
    logits = torch.zeros(none.shape, requires_grad=True)
    loss = task_losses({"cvr": logits}, dataclasses.replace(batch, click=none, conversion=none))["cvr"]
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_an_epoch_visits_each_request_once_and_pads_little(data: TrainingData) -> None:
    count = data.batches_per_epoch(16)
    first = [data.batch(seed=1, step=step, batch_requests=16) for step in range(count)]
    visited = np.concatenate(first)
    assert len(np.unique(visited)) == count * 16 > len(data.train) - 16
    assert np.isin(visited, data.train).all()
    second = [data.batch(seed=1, step=count + step, batch_requests=16) for step in range(count)]
    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    again = TrainingData(data.logs, MODEL, train_fraction=0.8)
    assert np.array_equal(again.batch(seed=1, step=count + 1, batch_requests=16), second[1])
    assert not np.array_equal(again.batch(seed=2, step=0, batch_requests=16), first[0])
    padded = sum(16 * data.requests.encode(b).inputs["event_price"].shape[1] for b in first)
    valid = sum(data.requests.encode(b).inputs["history_length"].sum() for b in first)
    assert padded < 1.3 * valid


def test_training_sees_only_what_came_before(data: TrainingData) -> None:
    index = data.requests.index
    assert index.timestamp[data.train].max() < index.timestamp[data.held_out].min()


# Determinism and options


@pytest.fixture(scope="module")
def plain(logs: Logs, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], str, Path]:
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("plain") / "model"
    return *losses_of(RUN, logs, output), output


def test_the_checkpoint_holds_what_was_trained(plain: tuple[list[float], str, Path], data: TrainingData) -> None:
    _, sha256, output = plain
    model = load_checkpoint(output)
    assert weights_hash(model) == sha256
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["weights_sha256"] == sha256
    assert metrics["training"] == RUN.to_json()
    held_out = TrainingData(data.logs, MODEL, train_fraction=RUN.train_fraction)
    assert metrics["held_out"] == evaluate(model, held_out, batch_requests=2 * RUN.batch_requests)
    assert sorted(path.name for path in output.iterdir()) == ["config.json", "metrics.json", "model.safetensors"]
    assert list(output.parent.iterdir()) == [output]


def test_one_seed_one_model(plain: tuple[list[float], str, Path], logs: Logs, tmp_path: Path) -> None:
    losses, sha256, _ = plain
    assert losses_of(RUN, logs, tmp_path / "again") == (losses, sha256)
    assert losses_of(dataclasses.replace(RUN, seed=1), logs, tmp_path / "other")[1] != sha256


def test_recompute_changes_nothing(plain: tuple[list[float], str, Path], logs: Logs, tmp_path: Path) -> None:
    losses, sha256, _ = plain
    assert losses_of(dataclasses.replace(RUN, recompute=True), logs, tmp_path / "model") == (losses, sha256)


def test_rmsprop_trains(logs: Logs, tmp_path: Path) -> None:
    run = dataclasses.replace(RUN, dense_optimizer="rmsprop", dense_lr=5e-3)
    losses, _ = losses_of(run, logs, tmp_path / "model")
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_bf16_losses_are_close(plain: tuple[list[float], str, Path], logs: Logs, tmp_path: Path) -> None:
    losses, sha256, _ = plain
    half, other = losses_of(dataclasses.replace(RUN, precision="bf16"), logs, tmp_path / "model")
    assert other != sha256
    assert np.abs(np.array(half) - losses).max() < 0.02 * max(losses)


def test_bf16_reaches_the_products_inside_the_ops(data: TrainingData) -> None:
    model = random_model(MODEL, 0).train()
    batch = data.tensors(data.train[:8], torch.device("cpu"))
    seen: list[torch.dtype] = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.bmm.default:
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Spy(), torch.autocast("cpu", torch.bfloat16):
        logits = model(batch.user, batch.candidate)
        sum(value.sum() for value in logits.values()).backward()
    assert logits["ctr"].dtype == torch.float32
    assert len(seen) > 20 * MODEL.layers
    assert set(seen) == {torch.bfloat16}


# Resuming


def command(output: Path, *extra: str) -> list[str]:
    call = "from onetrans.cli.train import train_command; train_command()"
    return [sys.executable, "-c", call, "--output", str(output), *extra]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(MODEL.to_json()))
    return tmp_path / "config.json"


def test_a_killed_run_resumes_to_the_same_bits(config_file: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle, then --resume: the weights of an uninterrupted run."""
    output = tmp_path / "killed"
    arguments = command(
        output,
        *("--config", str(config_file), "--users", "30", "--requests-per-user", "8"),
        *("--steps", "48", "--batch-requests", "16", "--checkpoint-every", "3"),
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = state_folder(output)
    limit = time.monotonic() + 60
    while time.monotonic() < limit and process.poll() is None:
        if any(path.name > "step-000000008" for path in folder.glob("step-*")):
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not output.exists()
    kept = max(path.name for path in folder.glob("step-*"))
    assert "step-000000009" <= kept < "step-000000048"

    refused = CliRunner().invoke(train_command, arguments[3:])
    assert isinstance(refused.exception, OutputExistsError)
    assert "continue it with --resume" in str(refused.exception)
    other = CliRunner().invoke(train_command, [*arguments[3:], "--resume", "--dense-lr", "0.5"])
    assert isinstance(other.exception, ConfigError)
    assert "cannot resume: dense_lr was" in str(other.exception)

    resumed = CliRunner().invoke(train_command, [*arguments[3:], "--resume", "--json"])
    assert resumed.exit_code == 0, resumed.output
    assert not folder.exists()
    whole = tmp_path / "whole"
    straight = CliRunner().invoke(train_command, [*command(whole)[3:], *arguments[5:], "--json"])
    assert straight.exit_code == 0, straight.output
    assert weights_hash(load_checkpoint(output)) == weights_hash(load_checkpoint(whole))
    again = CliRunner().invoke(train_command, [*arguments[3:], "--resume"])
    assert isinstance(again.exception, OutputExistsError)
    assert f"the run into {output} is finished" in str(again.exception)


class StoppedError(Exception):
    pass


def test_a_damaged_state_is_refused(logs: Logs, tmp_path: Path) -> None:
    output = tmp_path / "model"

    def stop(report: StepReport) -> None:
        if report.step == 12:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(RUN, MODEL, logs, output, stop)
    (newest,) = state_folder(output).iterdir()
    assert newest.name == "step-000000010"
    other = SyntheticConfig(users=30, requests_per_user=8, candidates_per_request=5, seed=9).logs(MODEL)
    with pytest.raises(ConfigError, match="cannot resume: log was"):
        train(RUN, MODEL, other, output, resume=True)
    path = newest / "optimizers.safetensors"
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"optimizers.safetensors is damaged; remove"):
        train(RUN, MODEL, logs, output, resume=True)
    path.write_bytes(whole)
    (newest / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"step-000000010 is damaged"):
        train(RUN, MODEL, logs, output, resume=True)


# Wrong input


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"precision": "fp8"}, "training precision is 'fp8'; allowed: fp32, bf16"),
        ({"batch_requests": 0}, "training batch_requests is 0; it must be at least 1"),
        ({"dense_lr": float("nan")}, "training dense_lr is nan; it must be positive"),
        ({"steps": -1}, "training steps is -1; it must not be negative"),
        ({"train_fraction": 1.0}, "training train_fraction is 1.0; it must lie between 0 and 1"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_settings_that_cannot_be(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**values)
    assert str(caught.value) == expected


def test_too_large_a_batch(logs: Logs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_requests 9999 exceeds the 216 training requests"):
        train(dataclasses.replace(RUN, batch_requests=9999), MODEL, logs, tmp_path / "model")


def test_an_unknown_task(logs: Logs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="logs hold no labels for task 'like'; training knows ctr, cvr"):
        train(RUN, dataclasses.replace(MODEL, tasks=("ctr", "like")), logs, tmp_path / "model")


def test_a_log_of_other_features(logs: Logs, tmp_path: Path) -> None:
    schema = dataclasses.replace(MODEL.schema, user=(*MODEL.schema.user, Feature(name="height", kind="numeric")))
    with pytest.raises(DataError, match="user feature height is absent"):
        train(RUN, dataclasses.replace(MODEL, schema=schema), logs, tmp_path / "model")
    with pytest.raises(ConfigError, match="give --data"):
        LOG.logs(dataclasses.replace(MODEL, schema=schema))


def test_a_diverging_run_stops(logs: Logs, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"the loss became (nan|inf) at step \d+ of 24; lower the learning rates"):
        train(dataclasses.replace(RUN, dense_lr=1e38), MODEL, logs, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_an_absent_gpu_is_said(logs: Logs, tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match="torch finds none; use cpu"):
        train(dataclasses.replace(RUN, device="cuda"), MODEL, logs, tmp_path / "model")


def test_an_existing_output(logs: Logs, tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match="exists already; name another output or remove it"):
        train(RUN, MODEL, logs, tmp_path)


# The command


def test_the_command_writes_logs_that_train_alike(config_file: Path, tmp_path: Path) -> None:
    sizes = ("--config", str(config_file), "--steps", "3", "--batch-requests", "8", "--json")
    written = tmp_path / "logs"
    first = CliRunner().invoke(
        train_command,
        [
            *command(tmp_path / "a", *sizes)[3:],
            "--users",
            "12",
            "--requests-per-user",
            "6",
            "--write-logs",
            str(written),
        ],
    )
    assert first.exit_code == 0, first.output
    metrics = json.loads(first.stdout)
    assert metrics["steps"] == 3
    assert read_logs(written).schema == MODEL.schema
    second = CliRunner().invoke(train_command, [*command(tmp_path / "b", *sizes)[3:], "--data", str(written)])
    assert json.loads(second.stdout)["weights_sha256"] == metrics["weights_sha256"]
    assert "step 3/3  loss" in second.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give either --preset or --config"),
        (["--preset", "tiny", "--config", "x"], "give either --preset or --config"),
        (["--preset", "huge"], "'huge' is not one of 'tiny', 'onetrans-s', 'onetrans-l'"),
        (["--preset", "tiny", "--data", "x", "--users", "3"], "make a synthetic log; drop --data"),
        (["--preset", "tiny", "--precision", "fp8"], "'fp8' is not one of 'fp32', 'bf16'"),
    ],
    ids=["neither", "both", "unknown-preset", "data-and-users", "precision"],
)
def test_usage(arguments: list[str], expected: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(train_command, ["--output", str(tmp_path / "model"), *arguments])
    assert result.exit_code == 2
    assert expected in result.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "must hold a JSON object"), ("{}", "the config lacks")],
    ids=["missing", "cut", "list", "empty"],
)
def test_config_files(text: str | None, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    if text is not None:
        path.write_text(text)
    result = CliRunner().invoke(train_command, ["--output", str(tmp_path / "model"), "--config", str(path)])
    assert isinstance(result.exception, ConfigError)
    assert expected in str(result.exception)


# What it learns

ENOUGH, OVER_POPULARITY, OVER_NO_HISTORY = 0.72, 0.07, 0.05


def train_tiny(folder: Path, *, history: bool) -> tuple[TrainResult, float]:
    """What `onetrans train --preset tiny` trains, or the same model without any history; and its seconds of CPU."""
    torch.set_num_threads(1)
    model = preset("tiny")
    logs = SyntheticConfig().logs(model)
    if not history:
        events = logs.events
        none = dataclasses.replace(
            events,
            user_id=events.user_id[:0],
            timestamp=events.timestamp[:0],
            behaviour=events.behaviour[:0],
            features={name: column[:0] for name, column in events.features.items()},
        )
        logs = dataclasses.replace(logs, events=none)
    began = time.process_time()
    return train(TrainConfig(), model, logs, folder), time.process_time() - began


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Both trainings, one beside the other: each takes one thread."""
    folder = tmp_path_factory.mktemp("tiny")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        other = pool.submit(train_tiny, folder / "without", history=False)
        with_history, seconds = train_tiny(folder / "with", history=True)
        without, _ = other.result()
    return {
        "model": with_history.held_out["ctr"],
        "cvr": with_history.held_out["cvr"],
        "popularity": (with_history.popularity or {})["ctr"],
        "without": without.held_out["ctr"],
        "seconds": seconds,
    }


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["auc", "uauc"])
def test_tiny_beats_popularity_and_a_model_without_history(tiny: dict[str, Any], measure: str) -> None:
    assert tiny["model"][measure] > ENOUGH
    assert tiny["model"][measure] > tiny["popularity"][measure] + OVER_POPULARITY
    assert tiny["model"][measure] > tiny["without"][measure] + OVER_NO_HISTORY
    assert tiny["cvr"][measure] > 0.55


@pytest.mark.slow
def test_tiny_trains_in_two_minutes_of_two_cores(tiny: dict[str, Any]) -> None:
    """In CPU seconds, so that what else the machine does counts little: 150 of the 240 that two cores have."""
    assert tiny["seconds"] < 150
