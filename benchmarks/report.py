"""Shows records: `python -m benchmarks.report` writes README.md's table and draws the plots, from the JSON alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click

from benchmarks.context import ROOT
from benchmarks.gpu.table import gpu_markdown
from benchmarks.suite import format_outcome, format_target, format_value, read_suite
from onetrans.bench.plots import plot_latency
from onetrans.bench.record import Record
from onetrans.bench.report import latency_rows, markdown_row, origin, title
from onetrans.errors import DataError, JobError, OneTransError

BEGIN, END = "<!-- measures:begin -->", "<!-- measures:end -->"
GPU_BEGIN, GPU_END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
GPU = "gpu"  # stem of the GPU suite's record, which has a table of its own
APART = ("gpu", "gpu-tuning", "compiled")  # stems of records that are no rows of the first table
HEAD = ("measure", "target", "predicted", "measured", "met")


def suite_paths(results: Path) -> list[Path]:
    """The suites' records in the results folder, those of GPU and compiler apart.

    Raises:
        DataError: There is none.
    """
    paths = sorted(path for path in results.glob("*.json") if path.stem not in APART)
    if not paths:
        raise DataError(f"{results} holds no record; run `python -m benchmarks.cpu` first")
    return paths


def measures_markdown(suites: list[Record]) -> str:
    """The table of all measures, latencies apart, with where each was measured."""
    lines: list[str] = []
    for suite in suites:
        origins: dict[str, list[str]] = {}
        rows = []
        for name, measure in suite["measures"].items():
            if measure["key"]["quick"]:
                raise DataError(f"measure {name} is of a --quick run; measure it in full before it is shown")
            origins.setdefault(origin(measure["environment"]), []).append(name)
            rows += [] if measure["records"] else [_cells(row) for row in measure["rows"]]
        lines += [markdown_row(HEAD), markdown_row(("---", "---:", "---:", "---:", "---"))]
        lines += [markdown_row(row) for row in rows] + [""]
        for record in latency_records(suite):
            lines += _latency(record)
        for measure in suite["measures"].values():
            for name, (head, *body) in measure.get("tables", {}).items():
                align = ("---", *("---:" for _ in head[1:]))
                lines += [f"{name}:", "", *(markdown_row(row) for row in (head, align, *body)), ""]
        for where, names in origins.items():
            what = "All measured on" if len(origins) == 1 else f"{', '.join(names)} measured on"
            lines += [f"{what} {where} Intervals are of 95%.", ""]
    return "\n".join(lines).rstrip() + "\n"


def latency_records(suite: Record) -> Iterator[Record]:
    """The latency records of a suite."""
    for measure in suite["measures"].values():
        yield from measure["records"].values()


def write_readme(readme: Path, results: Path) -> bool:
    """Puts the tables between their marks; returns whether anything changed.

    Raises:
        JobError: The file cannot be read or written.
        DataError: It does not hold the marks, once and in order.
    """
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise JobError(f"{readme} cannot be read: {error}") from error
    wanted = with_tables(text, results, readme)
    if wanted != text:
        readme.write_text(wanted, encoding="utf-8")
    return wanted != text


def with_table(text: str, table: str, where: Path, begin: str = BEGIN, end: str = END) -> str:
    """The text with the table between its marks.

    Raises:
        DataError: It does not hold the marks, once and in order.
    """
    block = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if text.count(begin) != 1 or text.count(end) != 1 or not block.search(text):
        raise DataError(f"{where} must hold {begin} and then {end}, each once")
    return block.sub(lambda _: f"{begin}\n{table}{end}", text)


def with_tables(text: str, results: Path, where: Path) -> str:
    """The text with the suites' table, and where there is a record of the GPU suite, with that one's.

    Raises:
        DataError: A record or a pair of marks is missing.
    """
    text = with_table(text, measures_markdown([read_suite(path) for path in suite_paths(results)]), where)
    held = results / f"{GPU}.json"
    return with_table(text, gpu_markdown(read_suite(held)), where, GPU_BEGIN, GPU_END) if held.exists() else text


def _cells(row: dict[str, object]) -> tuple[str, ...]:
    met = {True: "yes", False: "**no**", None: ""}[row["met"]]  # type: ignore[index]
    prediction = format_value(row["prediction"], str(row["unit"]))  # type: ignore[arg-type]
    return str(row["what"]), format_target(row), prediction, format_outcome(row), met


def _latency(record: Record) -> list[str]:
    names = list(next(iter(record["summary"].values())))
    head = [markdown_row(("ms", *names)), markdown_row(("---", *("---:" for _ in names)))]
    return [f"{title(record)}:", "", *head, *(markdown_row(row) for row in latency_rows(record)), ""]


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit 1 where README and records disagree.")
@click.option("--readme", type=click.Path(path_type=Path), default=ROOT / "README.md", show_default=False)
@click.option("--results", type=click.Path(path_type=Path), default=ROOT / "benchmarks" / "results", show_default=False)
def main(check: bool, readme: Path, results: Path) -> None:
    """Write the README's table and draw the plots, from the records."""
    try:
        raise SystemExit(_check(readme, results) if check else _write(readme, results))
    except OneTransError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_status) from None


def _check(readme: Path, results: Path) -> int:
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise JobError(f"{readme} cannot be read: {error}") from error
    if with_tables(text, results, readme) == text:
        return 0
    click.echo(f"{readme} and the records in {results} disagree; run `python -m benchmarks.report`", err=True)
    return 1


def _write(readme: Path, results: Path) -> int:
    paths = suite_paths(results)
    suites = [read_suite(path) for path in paths]
    changed = write_readme(readme, results)
    click.echo(f"{readme}: {'written' if changed else 'up to date'}", err=True)
    for path, suite in zip(paths, suites, strict=True):
        for record in latency_records(suite):
            picture = results / f"{path.stem}-latency-{record['bundle']['name']}.svg"
            plot_latency(record, picture)
            click.echo(f"{picture}: drawn", err=True)
    return 0


if __name__ == "__main__":
    main()
