"""Reports of latency records: a rich table, a Markdown table and a line on where they come from.

`python -m onetrans.bench.report RECORD [--plot FILE]` prints the Markdown and draws the plot, after measuring.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from onetrans.bench.plots import plot_latency
from onetrans.bench.record import Record, read_record
from onetrans.errors import DataError, OneTransError


def latency_rows(record: Record) -> Iterator[tuple[str, ...]]:
    """Component, then each percentile in milliseconds with its interval."""
    for component, estimates in record["summary"].items():
        yield component, *(milliseconds(estimate) for estimate in estimates.values())


def milliseconds(estimate: dict[str, float]) -> str:
    """`12.3 (12.1 – 12.9)`, from seconds."""
    value, low, high = (f"{1e3 * estimate[key]:.2f}" for key in ("value", "low", "high"))
    return f"{value} ({low} – {high})"


def latency_table(record: Record) -> Table:
    """The percentiles for a terminal."""
    table = Table(
        title=f"{title(record)}\nmilliseconds, with 95% confidence intervals",
        title_justify="left",
        caption="\n".join(record["notes"]),
        caption_justify="left",
    )
    table.add_column("component")
    for name in next(iter(record["summary"].values())):
        table.add_column(name, justify="right")
    for row in latency_rows(record):
        table.add_row(*row)
    return table


def latency_markdown(record: Record) -> str:
    """The percentiles as a Markdown table, with its origin below."""
    notes = (f"Note: {note}." for note in record["notes"])
    return "\n".join([*latency_lines(record), "", *notes, origin(record["environment"]), ""])


def latency_lines(record: Record) -> list[str]:
    """The percentiles as lines of Markdown, under their title."""
    head = ("ms", *next(iter(record["summary"].values())))
    return [f"**{title(record)}**", "", *markdown_table(head, latency_rows(record))]


def title(record: Record) -> str:
    """Model, load and number of requests."""
    bundle, load = record["bundle"], record["load"]
    what = f"requests of {load['input']}"
    if load["input"] is None:
        up_to = "up to " if load["spread"] == "uniform" else ""
        what = f"{up_to}{load['events']} events, {up_to}{load['candidates']} candidates"
    threads = "default threads" if record["threads"] is None else f"{record['threads']} threads"
    model = f"{bundle['name']} ({bundle['target']}, {bundle['precision']})"
    return f"{model}, {what}, {load['requests']} requests, {threads}"


def origin(environment: dict[str, Any]) -> str:
    """Machine, commit and date in one line."""
    commit = (environment["commit"] or "no checkout")[:12] + (" with changes" if environment["dirty"] else "")
    memory = environment["memory_bytes"] / 2**30
    machine = f"{environment['cpu']}, {environment['cores']} cores, {memory:.0f} GiB"
    return f"{machine}; {commit}; {environment['date'][:10]}."


def gpu_origin(where: Mapping[str, Any]) -> str:
    """Device, versions, commit and date in one line."""
    commit = (where["commit"] or "no checkout")[:12] + (" with changes" if where["dirty"] else "")
    gpu, versions = where["gpu"], where["libraries"]
    told = f"torch {versions['torch']}, CUDA {gpu['cuda']}, Triton {versions['triton']}"
    return f"one {gpu['name']}, {told}; {commit}; {where['date'][:10]}."


def markdown_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, all columns but the first to the right."""
    rows = [head, ("---", *("---:" for _ in head[1:])), *body]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in rows]


def between(text: str, mark: str, lines: Iterable[str], where: Path) -> str:
    """The text with lines between its marks.

    Raises:
        DataError: It does not hold the marks, once and in order.
    """
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    block = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if text.count(begin) != 1 or text.count(end) != 1 or not block.search(text):
        raise DataError(f"{where} must hold {begin} and then {end}, each once")
    content = "\n".join([begin, *lines, end])
    return block.sub(lambda _: content, text)


@click.command()
@click.argument("record", type=click.Path(path_type=Path))
@click.option("--plot", type=click.Path(path_type=Path), help="Draw it into this SVG or PNG file.")
def main(record: Path, plot: Path | None) -> None:
    """Print the Markdown table of a record that `onetrans bench --record` wrote."""
    try:
        found = read_record(record)
        click.echo(latency_markdown(found))
        if plot is not None:
            plot_latency(found, plot)
    except OneTransError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_status) from None


if __name__ == "__main__":
    main()
