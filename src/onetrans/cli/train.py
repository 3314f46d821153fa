"""`onetrans train`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

_PRESETS = ("tiny", "onetrans-s", "onetrans-l")


@click.command()
@click.option("--preset", type=click.Choice(_PRESETS), help="A named model configuration.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="A model configuration as JSON.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder to write the checkpoint to.")
@click.option("--data", type=click.Path(path_type=Path), help="Log folder; left out, a synthetic log is generated.")
@click.option("--users", type=int, help="Users of the synthetic log.")
@click.option("--requests-per-user", type=int, help="Requests of each.")
@click.option("--write-logs", type=click.Path(path_type=Path), help="Also save the synthetic log in this folder.")
@click.option("--epochs", type=float, help="Passes over the training requests.")
@click.option("--steps", type=int, help="Steps in all, instead of --epochs.")
@click.option("--batch-requests", type=int, help="Requests in a step.")
@click.option("--seed", type=int, help="Of the weights, the order of the batches and the synthetic log.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="bf16 is autocast over float32 weights.")
@click.option("--recompute", is_flag=True, default=None, help="Trade time for memory in the backward pass.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where to train.")
@click.option("--checkpoint-every", type=int, help="Steps between checkpoints to resume from.")
@click.option("--resume", is_flag=True, help="Continue an unfinished run into --output.")
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as one JSON object.")
def train(
    *,
    preset: str | None,
    config_file: Path | None,
    output: Path,
    data: Path | None,
    users: int | None,
    requests_per_user: int | None,
    write_logs: Path | None,
    resume: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a model on logs, or on a synthetic log, and write its checkpoint and metrics.

    Without --data a synthetic log is generated in memory. A run that was killed continues with --resume and ends with
    the same weights.
    """
    from onetrans.features import logs as log_files
    from onetrans.model.training.config import TrainConfig
    from onetrans.model.training.data import SyntheticConfig
    from onetrans.model.training.loop import train as run

    if (preset is None) == (config_file is None):
        raise click.UsageError("give either --preset or --config")
    if data is not None and (users is not None or requests_per_user is not None or write_logs is not None):
        raise click.UsageError("--users, --requests-per-user and --write-logs make a synthetic log; drop --data")
    given = {name: value for name, value in options.items() if value is not None}
    config = TrainConfig(**given)
    logs = None if data is None else log_files.read_logs(data)
    model = _model_config(preset, config_file, None if logs is None else logs.schema)
    if logs is None:
        sizes = {"users": users, "requests_per_user": requests_per_user, "seed": config.seed}
        logs = SyntheticConfig(**{name: size for name, size in sizes.items() if size is not None}).logs(model)
        if write_logs is not None:
            log_files.write_logs(logs, write_logs)
    with _progress() as show:
        result = run(config, model, logs, output, show, resume=resume)
    if as_json:
        click.echo(json.dumps({"output": str(output), **result.metrics}))
    else:
        _print(result.metrics, output)


def _model_config(preset: str | None, path: Path | None, schema: Any) -> Any:
    """The model's configuration; a preset takes the schema of the given log."""
    from onetrans.errors import ConfigError
    from onetrans.model import presets
    from onetrans.model.config import ModelConfig

    if preset is not None:
        model = presets.preset(preset)
        return model if schema is None else dataclasses.replace(model, schema=schema)
    assert path is not None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; give a model configuration as JSON") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if isinstance(found, dict) and isinstance(found.get("config"), dict):
        found = found["config"]  # a checkpoint's config.json
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold a JSON object, the model's configuration")
    return ModelConfig.from_json(found)


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar on stderr; where that is no terminal, a line every tenth of the run."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from onetrans.model.training.loop import StepReport

    console = Console(stderr=True)
    if not console.is_terminal:

        def line(report: StepReport) -> None:
            if report.step % max(1, report.steps // 10) == 0 or report.step == report.steps:
                print(f"step {report.step}/{report.steps}  {_figures(report)}", file=sys.stderr, flush=True)

        yield line
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=None)

        def update(report: StepReport) -> None:
            bar.update(task, completed=report.step, total=report.steps, description=_figures(report))

        yield update


def _figures(report: Any) -> str:
    return f"loss {report.loss:.4f}  AUC {report.auc:.3f}  {report.requests_per_second:.0f} requests/s"


def _print(metrics: Any, output: Path) -> None:
    click.echo(f"{'held out':12}{'task':6}{'AUC':>8}{'UAUC':>8}")
    for name, report in (("model", metrics["held_out"]), ("popularity", metrics["popularity"] or {})):
        for task, values in report.items():
            cells = "".join(f"{'-' if v is None else format(v, '.4f'):>8}" for v in (values["auc"], values["uauc"]))
            click.echo(f"{name:12}{task:6}{cells}")
    click.echo(f"{metrics['steps']} steps in {metrics['seconds']:.0f} s; checkpoint in {output}")
