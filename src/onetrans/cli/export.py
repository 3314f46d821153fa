"""`onetrans export`, also `onetrans-export`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from onetrans.cli.console import bundle_json, print_json, stages, stderr
from onetrans.cli.options import FROM_0, Choice, Verb, Whole, folder_option, json_option
from onetrans.errors import ConfigError, OutputExistsError
from onetrans.export.config import ExportConfig
from onetrans.model.presets import PRESETS
from onetrans.precision import BY_SHORT
from onetrans.runtime import targets

DEFAULTS = ExportConfig()


@click.command(
    "export",
    cls=Verb,
    examples=(
        f"onetrans export --checkpoint checkpoint --target {targets.TABLE[0].name} --output bundle",
        "onetrans export --preset onetrans-s --random-weights --output sized",
    ),
)
@folder_option("--checkpoint", help="The folder that `onetrans train` wrote.")
@click.option("--preset", type=Choice(list(PRESETS)), help="The model to export with --random-weights.")
@click.option("--random-weights", is_flag=True, help="Export --preset without a checkpoint, untrained, for sizing.")
@click.option(
    "--target",
    type=Choice(targets.names()),
    default=DEFAULTS.target,
    show_default=True,
    help="What the graphs are lowered to.",
)
@click.option(
    "--precision",
    type=Choice(list(BY_SHORT)),
    show_default="the target's first",
    help="The precision of weights, activations and state; allowed is, by target, "
    + "; ".join(f"{row.name}: {', '.join(row.precisions)}" for row in targets.TABLE)
    + ".",
)
@folder_option("--output", required=True, help="The folder to write the bundle to; it must not exist yet.")
@click.option(
    "--max-users",
    type=Whole(min=2),
    default=DEFAULTS.max_users,
    show_default=True,
    help="The largest number of users in one batch.",
)
@click.option(
    "--max-candidates",
    type=Whole(min=2),
    default=DEFAULTS.max_candidates,
    show_default=True,
    help="The largest number of candidates in one request.",
)
@click.option(
    "--seed",
    type=FROM_0,
    default=DEFAULTS.seed,
    show_default=True,
    help="The seed of the parity cases and of random weights, a whole number.",
)
@json_option
def export_command(
    checkpoint: Path | None,
    preset: str | None,
    random_weights: bool,
    target: str,
    precision: str | None,
    output: Path,
    max_users: int,
    max_candidates: int,
    seed: int,
    as_json: bool,
) -> None:
    """Turn a checkpoint into a verified bundle.

    The model's one forward is captured, split into prefill, append and decode, and lowered to the target; the bundle's
    scores are compared with the float64 reference. The output folder appears only when all of that has succeeded.
    """
    config = ExportConfig(
        target=target, precision=precision or "", max_users=max_users, max_candidates=max_candidates, seed=seed
    )
    if (checkpoint is None) == (preset is None) or random_weights != (preset is not None):
        raise ConfigError("give either --checkpoint FOLDER, or --preset NAME with --random-weights")
    if output.exists() or output.is_symlink():
        raise OutputExistsError(f"{output} exists already; name another path or remove it")
    with stages(f"exporting to {output}") as progress:
        progress("load")
        from onetrans.export import export
        from onetrans.model.checkpoint import load_checkpoint, random_model

        began = time.perf_counter()
        model = random_model(PRESETS[preset](), seed) if preset is not None else load_checkpoint(checkpoint or Path())
        bundle = export(model, output, config, progress)
    seconds = time.perf_counter() - began
    results = bundle.manifest.parity["results"]
    worst = max(results, key=lambda result: result["relative_error"])
    if as_json:
        print_json(
            {
                "bundle": bundle_json(bundle),
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
