"""Shows records: `python -m benchmarks.report` writes the tables of docs/benchmarks.md, the README's figures and plots.

All from the JSON in benchmarks/results alone: nothing in a table is typed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from benchmarks.context import RESULTS, ROOT
from onetrans.bench.plots import plot_latency
from onetrans.bench.record import Record
from onetrans.bench.report import between, gpu_origin, latency_lines, markdown_table, origin
from onetrans.bench.suite import HEAD, format_outcome, format_target, read_suite, row_cells
from onetrans.errors import DataError, JobError, OneTransError
from onetrans.files import replace_text

KINDS = ("prefill", "append", "decode", "request")  # what cases of whole programs begin with
FIGURES = (  # measure, beginning of the row's name, words of the README
    ("parity", "onetrans-s, relative error", "error of OneTrans-S's scores, relative to float64"),
    ("decode_vs_matmul", "decode of 100", "decode of 100 candidates over nothing but its MatMuls"),
    ("prefill_vs_matmul", "prefill of 1190", "prefill of 1190 events over nothing but its MatMuls"),
    ("append", "prefill of 1108 events over an append", "prefill of 1108 events over an append of 8 to a kept state"),
    ("returning", "prefill and decode over", "a returning user's request without a kept state over one with it"),
    ("latency", "onetrans-s, whole, p99", "whole request of OneTrans-S, 1190 events, 100 candidates, 2 CPU cores, p99"),
)


def records(results: Path) -> dict[str, Record]:
    """The suites' records by name, that of the CPU first."""
    found = {
        name: read_suite(path) for name in ("cpu", "gpu", "compiled") if (path := results / f"{name}.json").exists()
    }
    if "cpu" not in found:
        raise DataError(f"{results} holds no cpu.json; run `python -m benchmarks` first")
    for record in found.values():
        for name, measure in record["measures"].items():
            if measure["key"].get("quick"):
                raise DataError(f"measure {name} is of a --quick run; measure it in full before it is shown")
    return found


def cpu_lines(record: Record) -> Iterator[str]:
    """The table of all measures, latencies apart, with where each was measured."""
    measures = record["measures"]
    yield from markdown_table(
        HEAD, (row_cells(row) for m in measures.values() if not m["records"] for row in m["rows"])
    )
    for measure in measures.values():
        for latency in measure["records"].values():
            yield from ("", *latency_lines(latency))
    for measure in measures.values():
        for name, (head, *body) in measure["tables"].items():
            yield from ("", f"{name}:", "", *markdown_table(head, body))
    yield from _origins(measures, origin)


def _origins(measures: Mapping[str, Any], words: Any) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    for name, measure in measures.items():
        found.setdefault(words(measure["environment"]), []).append(name)
    for where, names in found.items():
        start = "All measured on" if len(found) == 1 else f"{', '.join(names)} measured on"
        yield from ("", f"{start} {where} Intervals are of 95%.")
    failed = [name for name, measure in measures.items() if measure.get("failed")]
    if failed:
        yield from ("", f"Failed: {', '.join(failed)}.")


def gpu_lines(record: Record) -> Iterator[str]:
    """Ceilings and targets, then every program's times by each contestant, then where all that was measured."""
    measures = {name: measure for name, measure in record["measures"].items() if name != "tests"}
    rows = [row for n, m in measures.items() for row in m["rows"] if row["target"] is not None or n == "ceilings"]
    yield from markdown_table(HEAD, map(row_cells, rows))
    times: dict[str, dict[str, dict[str, Any]]] = {}
    for measure in measures.values():
        for figure in measure["figures"]:
            if "seconds" in figure and figure["case"].startswith(KINDS):
                times.setdefault(figure["case"], {}).setdefault(figure["contestant"], figure)
    names = list(dict.fromkeys(name for found in times.values() for name in found))
    if times:
        body = [(case, *_times(found, names)) for case, found in times.items()]
        yield from ("", "Medians in milliseconds:", "", *markdown_table(("", *names, "floor"), body))
    yield from _origins(measures, gpu_origin)


def _times(found: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> Iterator[str]:
    yield from (f"{1e3 * found[name]['seconds']['value']:.3f}" if name in found else "" for name in names)
    yield f"{1e3 * next(iter(found.values()))['floor']:.3f}"


def compiled_lines(record: Record) -> Iterator[str]:
    """Variants, registers and faults of every model, dtype and architecture."""
    head, body = ("kernels of", "variants", "most registers", "bytes spilled", "faults"), []
    for name, measure in record["measures"].items():
        figures = measure["figures"]
        most, spilled = max(f["registers"] for f in figures), sum(f["spilled"] for f in figures)
        faults = next(f"{row['value']:.0f}" for row in measure["rows"] if row["name"].endswith("faults"))
        body.append((name, str(len(figures)), str(most), str(spilled), faults))
    yield from markdown_table(head, body)


def figure_lines(record: Record) -> Iterator[str]:
    """The README's table: one figure a line, out of the CPU's record."""
    body = []
    for measure, begin, words in FIGURES:
        rows = record["measures"].get(measure, {"rows": []})["rows"]
        row = next((row for row in rows if row["name"].startswith(begin)), None)
        if row is None:
            raise DataError(f"the record of the CPU has no row {begin!r} in measure {measure}; measure it again")
        body.append((words, format_outcome(row), format_target(row)))
    yield from markdown_table(("measure", "measured (95% interval)", "target"), body)


def written(readme: Path, page: Path, results: Path) -> dict[Path, tuple[str, str]]:
    """Both files' texts, as they are and as the records want them."""
    found, texts = records(results), {}
    for path in (readme, page):
        try:
            texts[path] = path.read_text(encoding="utf-8")
        except OSError as error:
            raise JobError(f"{path} cannot be read: {error}") from error
    wanted = {readme: between(texts[readme], "figures", figure_lines(found["cpu"]), readme), page: texts[page]}
    for name, lines in (("cpu", cpu_lines), ("gpu", gpu_lines), ("compiled", compiled_lines)):
        if name in found:
            wanted[page] = between(wanted[page], name, lines(found[name]), page)
    return {path: (texts[path], wanted[path]) for path in texts}


@click.command(epilog="Example: python -m benchmarks.report --check")
@click.option("--check", is_flag=True, help="Write nothing; exit 1 where a page and the records disagree.")
@click.option("--readme", type=click.Path(path_type=Path), default=ROOT / "README.md", help="Write figures here.")
@click.option("--page", type=click.Path(path_type=Path), default=ROOT / "docs/benchmarks.md", help="Write tables here.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, help="Read the records of this folder.")
def main(check: bool, readme: Path, page: Path, results: Path) -> None:
    """Write the tables of docs/benchmarks.md and of the README, and draw the plots, from the records."""
    try:
        texts = written(readme, page, results)
        for path, (now, wanted) in texts.items():
            if now != wanted and check:
                click.echo(f"{path} and the records in {results} disagree; run `python -m benchmarks.report`", err=True)
            elif not check:
                if now != wanted:
                    replace_text(path, wanted)
                click.echo(f"{path}: {'written' if now != wanted else 'up to date'}", err=True)
        if check:
            raise SystemExit(int(any(now != wanted for now, wanted in texts.values())))
        for measure in records(results)["cpu"]["measures"].values():
            for record in measure["records"].values():
                picture = results / f"cpu-latency-{record['bundle']['name']}.svg"
                plot_latency(record, picture)
                click.echo(f"{picture}: drawn", err=True)
    except OneTransError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_status) from None


if __name__ == "__main__":
    main()
