"""What every command prints with: progress and logs on stderr, results on stdout."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from onetrans.runtime.bundle import Bundle


def stderr() -> Console:
    """The console for progress and errors."""
    return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)  # a path may hold :smile:


def print_json(value: Any) -> None:
    """Prints one JSON object on stdout, and nothing else; NaN and infinity, which JSON lacks, become null."""
    sys.stdout.write(json.dumps(_finite(value), allow_nan=False) + "\n")  # ASCII, whatever the terminal's encoding


def bundle_json(bundle: Bundle) -> dict[str, str]:
    """What every JSON output says of a bundle, under `bundle`."""
    manifest = bundle.manifest
    return {
        "path": str(bundle.path),
        "name": manifest.name,
        "target": manifest.target,
        "device": manifest.device,
        "precision": manifest.precision,
        "weights_sha256": manifest.weights_sha256,
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(table: Table) -> None:
    """Prints a table on stdout, at full width where stdout is no terminal."""
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, emoji=False, width=160)
    console.print(table)


@contextmanager
def stages(title: str) -> Iterator[Callable[[str], None]]:
    """Shows the stage that runs: a spinner on a terminal, a line per stage elsewhere."""
    console = stderr()
    if not console.is_terminal:
        yield lambda stage: console.print(f"{title}: {stage}", markup=False)
        return
    with console.status(title) as status:
        yield lambda stage: status.update(f"{title}: {stage}")
