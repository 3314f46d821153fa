"""A suite's record: one JSON file of measures on any device, what a measure gives, and its figures in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from onetrans.bench.record import Record, read_record
from onetrans.bench.stats import Estimate, median, median_ratio, percentiles

FORMAT = "onetrans-suite"
VERSION = 2
HEAD = ("measure", "target", "predicted", "measured", "met")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure.

    Attributes:
        name: What was measured, in words.
        unit: Unit of value, interval, target and prediction; empty for a ratio.
        value: The outcome.
        low: Lower end of its 95% interval; None where there is a single measurement.
        high: Upper end.
        target: What it should be; None where the row only informs.
        at_least: Whether the target is a lower bound.
        prediction: From a reckoning of operations and bytes, before measuring; None where there is none.
        reckoning: How the prediction came about.
    """

    name: str
    unit: str
    value: float
    low: float | None = None
    high: float | None = None
    target: float | None = None
    at_least: bool = False
    prediction: float | None = None
    reckoning: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target


def estimated(estimate: Estimate, name: str, unit: str = "", *, scale: float = 1.0, **fields: Any) -> Row:
    """A row with an interval, its numbers times `scale`."""
    low, high = scale * estimate.low, scale * estimate.high
    return Row(name=name, unit=unit, value=scale * estimate.value, low=low, high=high, **fields)


@dataclass(kw_only=True)
class Outcome:
    """What a measure gives.

    Attributes:
        rows: Figures with targets and predictions.
        figures: Further facts as plain data, such as every contestant's times.
        samples: Raw samples by name; seconds, on a GPU microseconds block by block.
        notes: What a reader must know.
        records: Latency records by name.
        tables: Tables by title, the first row being the head.
        failed: Why no figure stands; empty where all do.
        facts: Further fields of the record's entry.
    """

    rows: list[Row] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    records: dict[str, Record] = field(default_factory=dict)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    failed: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def figure(self, name: str, value: float, unit: str = "", **fields: Any) -> None:
        """Adds a row of a single measurement."""
        self.rows.append(Row(name=name, unit=unit, value=value, **fields))

    def ratio(self, name: str, over: ArrayLike, under: ArrayLike, **fields: Any) -> None:
        """Adds a row: the median of paired samples' ratios."""
        self.rows.append(estimated(median_ratio(over, under), name, **fields))

    def milliseconds(self, name: str, seconds: ArrayLike, predicted: float | None = None, reckoning: str = "") -> None:
        """Adds a row: the median of samples, and what was predicted, all in seconds."""
        told = {} if predicted is None else {"prediction": 1e3 * predicted, "reckoning": reckoning}
        self.rows.append(estimated(median(seconds), f"{name}, median", "ms", scale=1e3, **told))

    def percentiles(self, name: str, seconds: ArrayLike) -> None:
        """Adds a row for each percentile of samples in seconds."""
        for rank, found in percentiles(seconds).items():
            self.rows.append(estimated(found, f"{name}, {rank}", "ms", scale=1e3))

    def plain(self) -> dict[str, Any]:
        """The entry's part of a record."""
        rows = [{**vars(row), "met": row.met} for row in self.rows]
        notes = [*self.notes, *(shortfall(row) for row in self.rows if row.met is False)]
        made = {"rows": rows, "figures": self.figures, "notes": notes, "samples": self.samples}
        made |= {"records": self.records, "tables": self.tables, **self.facts}
        return {**made, "failed": self.failed} if self.failed else made


def new_suite(name: str) -> Record:
    """A record without measures."""
    return {"format": FORMAT, "version": VERSION, "suite": name, "measures": {}}


def read_suite(path: str | Path) -> Record:
    """Reads a suite's record.

    Raises:
        DataError: It is missing, none, of another version or incomplete.
    """
    return read_record(path, form=FORMAT, version=VERSION, needed=("suite", "measures"))


def shortfall(row: Row) -> str:
    """By how much a target is missed."""
    assert row.target is not None
    if not row.target:
        return f"{row.name}: {format_value(row.value, row.unit)} where there should be none"
    return f"{row.name}: target missed by {100 * abs(row.value / row.target - 1):.0f}%"


def format_value(value: float | None, unit: str = "") -> str:
    """Three significant digits with the unit; "" for None."""
    if value is None:
        return ""
    text = f"{value:.2g}" if 0 < abs(value) < 1e-3 else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{text} {unit}".rstrip()


def format_target(row: Mapping[str, Any]) -> str:
    """`≤ 1.4` or `≥ 20`, "" without one."""
    if row["target"] is None:
        return ""
    return f"{'≥' if row['at_least'] else '≤'} {format_value(row['target'], row['unit'])}"


def format_outcome(row: Mapping[str, Any]) -> str:
    """The value with its interval."""
    text = format_value(row["value"], row["unit"])
    return text if row["low"] is None else f"{text} ({format_value(row['low'])} – {format_value(row['high'])})"


def format_row(row: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    parts = [f"{row['name']}: {format_outcome(row)}"]
    if row["target"] is not None:
        parts.append(f"target {format_target(row)}: {'met' if row['met'] else 'MISSED'}")
    if row["prediction"] is not None:
        parts.append(f"predicted {format_value(row['prediction'], row['unit'])}")
    return ", ".join(parts)


def row_cells(row: Mapping[str, Any]) -> Sequence[str]:
    """A row of a Markdown table under `HEAD`."""
    met = {True: "yes", False: "**no**", None: ""}[row["met"]]
    return row["name"], format_target(row), format_value(row["prediction"], row["unit"]), format_outcome(row), met
