"""A suite's record: one JSON file, a part per measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onetrans.bench.record import VERSION, Record, read_record

SUITE = "onetrans-suite"
NEEDED = ("suite", "measures")


def new_suite(name: str) -> Record:
    """A record without measures."""
    return {"format": SUITE, "version": VERSION, "suite": name, "measures": {}}


def read_suite(path: str | Path) -> Record:
    """Reads a suite's record.

    Raises:
        DataError: It is missing, none, too new or incomplete.
    """
    return read_record(path, form=SUITE, needed=NEEDED)


def format_value(value: float | None, unit: str) -> str:
    """Three significant digits with the unit; "" for None."""
    if value is None:
        return ""
    text = f"{value:.2g}" if 0 < abs(value) < 1e-3 else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{text} {unit}".rstrip()


def format_target(row: dict[str, Any]) -> str:
    """`≤ 1.4` or `≥ 200`, "" without one."""
    if row["target"] is None:
        return ""
    return f"{'≥' if row['at_least'] else '≤'} {format_value(row['target'], row['unit'])}"


def format_outcome(row: dict[str, Any]) -> str:
    """The value with its interval."""
    text = format_value(row["value"], row["unit"])
    if row["low"] is None:
        return text
    return f"{text} ({format_value(row['low'], '')} – {format_value(row['high'], '')})"


def format_row(row: dict[str, Any]) -> str:
    """One line for the terminal."""
    parts = [f"{row['what']}: {format_outcome(row)}"]
    if row["target"] is not None:
        parts.append(f"target {format_target(row)}: {'met' if row['met'] else 'MISSED'}")
    if row["prediction"] is not None:
        parts.append(f"predicted {format_value(row['prediction'], row['unit'])}")
    return ", ".join(parts)
