"""`onetrans inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from onetrans.cli.console import print_json, print_table, stderr
from onetrans.cli.picture import draw_split
from onetrans.errors import ConfigError, OutputExistsError
from onetrans.files import replace_text
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.manifest import Manifest


@click.command("inspect")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--svg", type=click.Path(path_type=Path), help="Where to draw the split; BUNDLE.svg if left out.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect_command(bundle: Path, svg: Path | None, as_json: bool) -> None:
    """Show how the graph was split, and draw it."""
    manifest = Bundle.open(bundle).manifest
    picture = svg or bundle.resolve().with_name(f"{bundle.resolve().name}.svg")
    if not picture.parent.is_dir() or picture.is_dir():
        raise ConfigError(f"--svg {picture} cannot be written: give a file in a folder that exists")
    _write_picture(picture, draw_split(manifest))
    if as_json:
        text = json.loads(manifest.dumps())
        print_json({**text, "picture": str(picture)})
        return
    print_table(_graphs(manifest))
    print_table(_cut(manifest))
    for line in _notes(manifest):
        click.echo(line)
    stderr().print(f"drew {picture}", markup=False)


def _write_picture(path: Path, text: str) -> None:
    """Writes a picture whole or not at all, over nothing but an older picture."""
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
    for tensor in manifest.state:
        shape = "[" + ", ".join(str(dim) for dim in tensor.dims) + "]"
        tokens = str(tensor.shape_per_user[0]) if tensor.is_window else "–"
        table.add_row(tensor.name, tensor.dtype, escape(shape), tokens, f"{tensor.bytes_per_user:,}")
    return table


def _notes(manifest: Manifest) -> list[str]:
    split = manifest.split
    dead, weights = split["dead"], split["dead_weights"]
    chunk = manifest.pyramid.chunk
    why = f"its {manifest.merge} merge" if manifest.merge != "time" else f"append_chunk {chunk}"
    notes = [
        f"append: exact until a history crosses a multiple of {chunk} events"
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
