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
_PATH = click.Path(path_type=Path)


def _option(name: str, help_text: str) -> Callable[[Any], Any]:
    """An option of `TrainConfig`, with its type and default."""
    field = name.removeprefix("--").replace("-", "_")
    default = getattr(_DEFAULTS, field)
    kind = click.Choice(CHOICES[field]) if field in CHOICES else type(default)
    return click.option(name, field, type=kind, default=default, show_default=True, help=help_text)


@click.command("train")
@click.option("--preset", "name", type=click.Choice(list(PRESETS)), help="A named model configuration.")
@click.option("--config", "config_file", type=_PATH, help="A model configuration as JSON, or a checkpoint's.")
@click.option("--output", required=True, type=_PATH, help="Folder to write the checkpoint to.")
@click.option("--data", type=_PATH, help="Log folder; left out, a synthetic log is generated.")
@click.option("--users", type=int, help=f"Users of the synthetic log.  [default: {_SYNTHETIC.users}]")
@click.option("--requests-per-user", type=int, help=f"Requests of each.  [default: {_SYNTHETIC.requests_per_user}]")
@click.option("--write-logs", "logs_to", type=_PATH, help="Also save the synthetic log in this folder.")
@_option("--epochs", "Passes over the training requests.")
@_option("--steps", "Steps in all; 0 takes them from --epochs.")
@_option("--batch-requests", "Requests in a step.")
@_option("--seed", "Of the weights, the order of the batches and the synthetic log.")
@_option("--precision", "bf16 is autocast over float32 weights.")
@click.option("--recompute", is_flag=True, help="Less memory and more time in the backward pass.")
@_option("--device", "Where to train.")
@_option("--threads", "CPU threads; 0 takes all cores.")
@_option("--dense-optimizer", "Of all but the embedding tables.")
@_option("--dense-lr", "Its peak learning rate.")
@_option("--embedding-lr", "Peak learning rate of the embedding tables.")
@_option("--checkpoint-every", "Steps between checkpoints to resume from.")
@click.option("--resume", is_flag=True, help="Continue an unfinished run into --output.")
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as one JSON object.")
def train_command(
    *,
    name: str | None,
    config_file: Path | None,
    output: Path,
    data: Path | None,
    users: int | None,
    requests_per_user: int | None,
    logs_to: Path | None,
    resume: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a model on logs, or on a synthetic log, and write its checkpoint and metrics.

    Without --data a synthetic log is generated in memory. A run that was killed continues with --resume and ends with
    the same weights.
    """
    if (name is None) == (config_file is None):
        raise click.UsageError("give either --preset or --config")
    if data is not None and (users, requests_per_user, logs_to) != (None, None, None):
        raise click.UsageError("--users, --requests-per-user and --write-logs make a synthetic log; drop --data")
    config = TrainConfig(**options)
    check_output(output, resume=resume)
    logs = None if data is None else read_logs(data)
    model = preset(name) if name is not None else _read_config(config_file)
    if logs is None:
        sizes = {"users": users, "requests_per_user": requests_per_user, "seed": config.seed}
        logs = SyntheticConfig(**{key: size for key, size in sizes.items() if size is not None}).logs(model)
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
    """A bar on stderr; where that is no terminal, a line every tenth of the run."""
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
