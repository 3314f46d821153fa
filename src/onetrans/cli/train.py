"""`onetrans train`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onetrans.cli.console import print_json, stderr
from onetrans.cli.options import (
    ABOVE_0,
    FROM_0,
    FROM_1,
    Choice,
    Real,
    Verb,
    Whole,
    file_option,
    folder_option,
    json_option,
    typed_options,
)
from onetrans.errors import ConfigError
from onetrans.features.logs import read_logs, write_logs
from onetrans.model.config import ModelConfig
from onetrans.model.presets import PRESETS, preset
from onetrans.model.training.config import CHOICES, SyntheticConfig, TrainConfig
from onetrans.model.training.places import check_output

if TYPE_CHECKING:
    from onetrans.model.training.loop import StepReport

_DEFAULTS = TrainConfig()
_SYNTHETIC = SyntheticConfig()


def _option(name: str, help_text: str, bounds: Whole | Real | None = None) -> Callable[[Any], Any]:
    """An option of `TrainConfig`, with its default, and bounds where it is a number."""
    field = name.removeprefix("--").replace("-", "_")
    kind = bounds or Choice(CHOICES[field])
    default = getattr(_DEFAULTS, field)
    return click.option(name, field, type=kind, default=default, show_default=True, help=help_text)


@click.command(
    "train",
    cls=Verb,
    examples=(
        "onetrans train --preset tiny --output checkpoint --write-logs logs",
        "onetrans train --preset tiny --data logs --output retrained --epochs 2",
    ),
)
@click.option("--preset", "name", type=Choice(list(PRESETS)), help="The named model to train.")
@file_option(
    "--config",
    "config_file",
    help="The model to train, as a JSON file or a checkpoint's config.json, in place of --preset.",
)
@folder_option("--output", required=True, help="The folder to write the checkpoint to; it must not exist yet.")
@folder_option("--data", show_default="a synthetic log", help="The folder of Parquet logs to train on.")
@click.option(
    "--users",
    type=FROM_1,
    default=_SYNTHETIC.users,
    show_default=True,
    help="The number of users in the synthetic log.",
)
@click.option(
    "--requests-per-user",
    type=FROM_1,
    default=_SYNTHETIC.requests_per_user,
    show_default=True,
    help="The number of requests that each user makes in the synthetic log.",
)
@folder_option(
    "--write-logs",
    "logs_to",
    show_default="none",
    help="The folder to write the synthetic log to; it must not exist yet.",
)
@_option("--epochs", "The number of passes over the training requests; a fraction stops early.", ABOVE_0)
@_option("--steps", "The number of steps in all; 0 takes it from --epochs.", FROM_0)
@_option("--batch-requests", "The number of requests in a step.", FROM_1)
@_option("--seed", "The seed of the weights, the batches and the synthetic log, a whole number.", FROM_0)
@_option("--precision", "The precision of activations: fp32, or bf16 by autocast; weights stay float32.")
@click.option(
    "--recompute", is_flag=True, help="Compute activations again in the backward pass: less memory, more time."
)
@_option("--device", "The device to train on.")
@_option("--threads", "The number of CPU threads; 0 takes all cores.", FROM_0)
@_option("--dense-optimizer", "The optimizer of all weights but the embedding tables.")
@_option("--dense-lr", "The peak learning rate of all weights but the embedding tables, per step.", ABOVE_0)
@_option("--embedding-lr", "The peak learning rate of the embedding tables, per step.", ABOVE_0)
@_option("--checkpoint-every", "The number of steps between checkpoints that --resume can start from.", FROM_1)
@click.option("--resume", is_flag=True, help="Continue an unfinished run into --output.")
@json_option
def train_command(
    *,
    name: str | None,
    config_file: Path | None,
    output: Path,
    data: Path | None,
    users: int,
    requests_per_user: int,
    logs_to: Path | None,
    resume: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a model on logs, or on a synthetic log.

    Writes a checkpoint with its metrics. Without --data a synthetic log is generated in memory. A run that was killed
    continues with --resume and ends with the same weights.
    """
    if (name is None) == (config_file is None):
        raise click.UsageError("give either --preset or --config")
    if data is not None and typed_options("users", "requests_per_user", "logs_to"):
        raise click.UsageError("--users, --requests-per-user and --write-logs make a synthetic log; drop --data")
    config = TrainConfig(**options)
    check_output(output, resume=resume)
    logs = None if data is None else read_logs(data)
    model = preset(name) if name is not None else _read_config(config_file)
    if logs is None:
        logs = SyntheticConfig(users=users, requests_per_user=requests_per_user, seed=config.seed).logs(model)
        if logs_to is not None:
            write_logs(logs, logs_to)
    elif name is not None:
        model = dataclasses.replace(model, schema=logs.schema)  # a preset fits itself to the log
    from onetrans.model.training.loop import train as run  # torch takes seconds to import

    with _progress() as show:
        result = run(config, model, logs, output, show, resume=resume)
    if as_json:
        print_json({"output": str(output), **result.metrics})
    else:
        click.echo(_table(result.metrics, output))


def _read_config(path: Path | None) -> ModelConfig:
    assert path is not None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a model configuration as JSON") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if isinstance(found, dict) and isinstance(found.get("config"), dict):
        found = found["config"]  # a checkpoint's config.json
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold a JSON object, the model's configuration")
    return ModelConfig.from_json(found)


@contextmanager
def _progress() -> Iterator[Callable[[StepReport], None]]:
    """Shows a bar on stderr; where that is no terminal, a line every tenth of the run."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = stderr()
    if not console.is_terminal:

        def line(report: StepReport) -> None:
            if report.step % max(1, report.steps // 10) == 0 or report.step == report.steps:
                console.print(f"step {report.step}/{report.steps}  {_figures(report)}", markup=False)

        yield line
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=None)

        def update(report: StepReport) -> None:
            bar.update(task, completed=report.step, total=report.steps, description=_figures(report))

        yield update


def _figures(report: StepReport) -> str:
    return f"loss {report.loss:.4f}  AUC {report.auc:.3f}  {report.requests_per_second:.0f} requests/s"


def _table(metrics: Mapping[str, Any], output: Path) -> str:
    lines = [f"{'held out':12}{'task':6}{'AUC':>8}{'UAUC':>8}"]
    for name, report in (("model", metrics["held_out"]), ("popularity", metrics["popularity"] or {})):
        for task, values in report.items():
            cells = "".join(f"{'-' if v is None else format(v, '.4f'):>8}" for v in (values["auc"], values["uauc"]))
            lines.append(f"{name:12}{task:6}{cells}")
    return "\n".join([*lines, f"{metrics['steps']} steps in {metrics['seconds']:.0f} s; checkpoint in {output}"])
