"""The README's GPU table, from the record alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.suite import format_outcome, format_target, format_value
from onetrans.bench.record import Record
from onetrans.bench.report import markdown_row
from onetrans.errors import DataError

TARGETS = ("measure", "target", "predicted", "measured", "met")
PASSES = ("prefill", "append", "decode", "request")


def gpu_markdown(record: Record) -> str:
    """Ceilings and targets, then every program's times by each way, then where all that was measured.

    Raises:
        DataError: It holds figures of a run whose tests failed.
    """
    measures = {name: measure for name, measure in record["measures"].items() if name != "tests"}
    for name, measure in measures.items():
        if measure["key"]["quick"]:
            raise DataError(f"measure {name} is of a --look run; measure it after the tests passed before it is shown")
    rows = [row for n, m in measures.items() for row in m["rows"] if row["target"] is not None or n == "ceilings"]
    lines = [*_table(TARGETS, [_cells(row) for row in rows]), ""]
    times: dict[str, dict[str, dict[str, Any]]] = {}
    for measure in measures.values():
        for figure in measure["figures"]:
            if "seconds" in figure and figure["case"].startswith(PASSES):
                times.setdefault(figure["case"], {}).setdefault(figure["contestant"], figure)
    ways = list(dict.fromkeys(way for found in times.values() for way in found))
    if times:
        body = [(case, *_times(found, ways)) for case, found in times.items()]
        lines += ["Medians in milliseconds:", "", *_table(("", *ways, "floor"), body), ""]
    lines += [f"{origin} Intervals are of 95%." for origin in dict.fromkeys(map(_origin, measures.values()))]
    failed = [name for name, measure in measures.items() if measure.get("failed")]
    lines += [f"Failed: {', '.join(failed)}."] if failed else []
    return "\n".join(lines).rstrip() + "\n"


def _table(head: tuple[str, ...], body: list[tuple[str, ...]]) -> Iterator[str]:
    yield markdown_row(head)
    yield markdown_row(("---", *("---:" for _ in head[1:])))
    yield from map(markdown_row, body)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    met = {True: "yes", False: "**no**", None: ""}[row["met"]]
    return row["what"], format_target(row), format_value(row["prediction"], row["unit"]), format_outcome(row), met


def _times(found: dict[str, dict[str, Any]], ways: list[str]) -> Iterator[str]:
    for way in ways:
        yield f"{1e3 * found[way]['seconds']['value']:.3f}" if way in found else ""
    yield f"{1e3 * next(iter(found.values()))['floor']:.3f}"


def _origin(measure: dict[str, Any]) -> str:
    where, key = measure["environment"], measure["key"]
    commit = (where["commit"] or "no checkout")[:12] + (" with changes" if where["dirty"] else "")
    versions = f"torch {key['torch']}, CUDA {key['cuda']}, Triton {key['triton']}"
    return f"Measured on one {key['device']}, {versions}; {commit}; {where['date'][:10]}."
