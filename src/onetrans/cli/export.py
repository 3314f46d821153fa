"""`onetrans export`, also `onetrans-export`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from onetrans.cli.console import print_json, stages, stderr
from onetrans.errors import ConfigError, OutputExistsError
from onetrans.export.config import ExportConfig
from onetrans.runtime import targets

DEFAULTS = ExportConfig()


@click.command("export")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Folder that `onetrans train` wrote.")
@click.option("--preset", help="With --random-weights: the model to size instead of a checkpoint.")
@click.option("--random-weights", is_flag=True, help="Export a preset untrained, for sizing.")
@click.option(
    "--target",
    default=DEFAULTS.target,
    show_default=True,
    help=f"One of: {', '.join(targets.names())}.",
)
@click.option(
    "--precision",
    default="",
    help="Of weights, activations and state.  [default: the target's first]",
)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The bundle; must not exist yet.")
@click.option("--max-users", default=DEFAULTS.max_users, show_default=True, help="Most users in one batch.")
@click.option("--max-candidates", default=DEFAULTS.max_candidates, show_default=True, help="Most candidates a request.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=DEFAULTS.seed,
    show_default=True,
    help="Of the parity cases and of random weights.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def export_command(
    checkpoint: Path | None,
    preset: str | None,
    random_weights: bool,
    target: str,
    precision: str,
    output: Path,
    max_users: int,
    max_candidates: int,
    seed: int,
    as_json: bool,
) -> None:
    """Turn a checkpoint into a verified bundle.

    Captures the model's one forward, splits it into prefill, append and decode, lowers them to the target, and compares
    the bundle with the float64 reference. OUTPUT appears only when all of that has succeeded.
    """
    config = ExportConfig(
        target=target, precision=precision, max_users=max_users, max_candidates=max_candidates, seed=seed
    )
    if (checkpoint is None) == (preset is None) or random_weights != (preset is not None):
        raise ConfigError("give either --checkpoint DIR, or --preset NAME with --random-weights")
    if output.exists() or output.is_symlink():
        raise OutputExistsError(f"{output} exists already; name another path or remove it")
    with stages(f"exporting to {output}") as progress:
        progress("load")
        from onetrans.export import export
        from onetrans.model.checkpoint import load_checkpoint, random_model
        from onetrans.model.presets import preset as named

        began = time.perf_counter()
        model = random_model(named(preset), seed) if preset is not None else load_checkpoint(checkpoint or Path())
        bundle = export(model, output, config, progress)
    seconds = time.perf_counter() - began
    results = bundle.manifest.parity["results"]
    worst = max(results, key=lambda result: result["relative_error"])
    if as_json:
        print_json(
            {
                "bundle": str(output),
                "target": target,
                "precision": config.precision,
                "seconds": seconds,
                "bytes": sum(int(file["bytes"]) for file in bundle.manifest.files.values()),
                "state_bytes_per_user": bundle.manifest.bytes_per_user,
                "parity": results,
            }
        )
        return
    stderr().print(
        f"{output}: {bundle.manifest.name} for {target} in {config.precision}, {seconds:.1f} s;"
        f" {len(results)} parity cases passed, largest relative error {worst['relative_error']:.1e};"
        f" state {bundle.manifest.bytes_per_user / 1e6:.2f} MB per user",
        markup=False,
    )
