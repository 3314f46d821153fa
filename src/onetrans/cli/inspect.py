"""`onetrans inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from onetrans.cli.console import bundle_json, print_json, print_table, stderr
from onetrans.cli.options import Verb, bundle_argument, file_option, json_option
from onetrans.cli.picture import draw_split, shape_text
from onetrans.errors import ConfigError, OutputExistsError
from onetrans.files import replace_text
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.manifest import Manifest


@click.command("inspect", cls=Verb, examples=("onetrans inspect bundle", "onetrans inspect bundle --svg split.svg"))
@bundle_argument
@file_option(
    "--svg",
    show_default="no picture",
    help="The file to draw the split into, as SVG; an older picture there is replaced.",
)
@json_option
def inspect_command(bundle: Path, svg: Path | None, as_json: bool) -> None:
    """Show how a bundle's graph was split, and draw it.

    BUNDLE is a folder that `onetrans export` wrote. Shown are the graphs, the state that crosses from prefill to
    decode, and what the split removed.
    """
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    if svg is not None:
        _write_picture(svg, draw_split(manifest))
    if as_json:
        picture = None if svg is None else str(svg)
        print_json({"bundle": bundle_json(opened), "picture": picture, **json.loads(manifest.dumps())})
        return
    print_table(_graphs(manifest))
    print_table(_cut(manifest))
    for line in _notes(manifest):
        click.echo(line)
    if svg is not None:
        stderr().print(f"drew {svg}", markup=False)


def _write_picture(path: Path, text: str) -> None:
    """Writes a picture whole or not at all, over nothing but an older picture."""
    if not path.parent.is_dir() or path.is_dir():
        raise ConfigError(f"--svg {path} cannot be written: give a file in a folder that exists")
    if path.exists() and not (path.is_file() and _is_picture(path)):
        raise OutputExistsError(f"--svg {path} exists already and is no picture; name another path or remove it")
    replace_text(path, text)


def _is_picture(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"<svg"


def _graphs(manifest: Manifest) -> Table:
    split = manifest.split
    table = Table(title=f"{manifest.name} for {manifest.target} in {manifest.precision}", title_justify="left")
    for column in ("graph", "runs", "inputs", "outputs"):
        table.add_column(column, overflow="fold")
    runs = {"prefill": "once per user", "append": "per new events of a cached user", "decode": "per request"}
    for name, graph in sorted(manifest.graphs.items(), key=lambda item: list(runs).index(item[0])):
        inputs = ", ".join(spec.name for spec in graph.inputs)
        table.add_row(name, runs[name], escape(inputs), escape(", ".join(spec.name for spec in graph.outputs)))
    table.caption = f"computations: {', '.join(f'{count} {scope}' for scope, count in split['nodes'].items())}"
    return table


def _cut(manifest: Manifest) -> Table:
    total = f"{manifest.bytes_per_user:,}"
    table = Table(title=f"the cut: state, at most {total} bytes per user", title_justify="left")
    for column in ("tensor", "dtype", "shape", "tokens at most", "bytes per user"):
        table.add_column(column, justify="left" if column in ("tensor", "dtype", "shape") else "right")
    for spec in manifest.state:
        tokens = str(spec.state.capacity) if spec.is_window and spec.state else "–"
        table.add_row(spec.name, spec.dtype, escape(shape_text(spec)), tokens, f"{spec.bytes_per_user:,}")
    return table


def _notes(manifest: Manifest) -> list[str]:
    split = manifest.split
    dead, weights = split["dead"], split["dead_weights"]
    events = manifest.pyramid.chunk
    why = f"its {manifest.merge} merge" if manifest.merge != "time" else f"windows that move with every {events} events"
    notes = [
        f"append: exact until a history crosses a multiple of {events} events"
        if manifest.can_append
        else f"append: never exact with {why}; states are reused as they are or prefilled",
        f"removed: {len(dead)} computations that feed nothing"
        + (f", and the weights {', '.join(weights)}" if weights else ""),
        f"partial products: {', '.join(split['partial_products']) or 'none'}",
        f"folded: {len(split['folded'])} constants",
        "kept in decode although they read user-scope values:",
    ]
    return notes + [
        f"  {held['node']} reads {', '.join(held['inputs'])}: {held['reason']}" for held in split["held_back"]
    ]
