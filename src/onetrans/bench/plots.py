"""Pictures of latency records, drawn after measuring; matplotlib is needed here alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from onetrans.bench.record import Record
from onetrans.errors import JobError, MissingDependencyError

COLOURS = {"encode": "#8c8c8c", "prefill": "#1f77b4", "decode": "#d9742b", "whole": "#222222"}
PARTS = ("encode", "prefill", "decode")
SUFFIXES = (".svg", ".png", ".pdf")


def plot_latency(record: Record, path: str | Path) -> None:
    """Draws the distribution of every component, and what each request's time is made of.

    The same record gives the same bytes of SVG.

    Args:
        record: A latency record with its raw samples.
        path: Ends with .svg, .png or .pdf; replaced if it is there.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        JobError: The disk refused, or the ending is unknown.
    """
    if Path(path).suffix not in SUFFIXES:
        raise JobError(f"{path} cannot be drawn; name a file that ends with {', '.join(SUFFIXES)}")
    figure = _new_figure(10.0, 4.0)
    left, right = figure.subplots(1, 2)
    samples = {name: 1e3 * np.asarray(values) for name, values in record["samples"].items()}
    _distribution(left, samples)
    _stack(right, samples)
    bundle, load = record["bundle"], record["load"]
    size = "requests from a file" if load["input"] else f"{load['events']} events, {load['candidates']} candidates"
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.suptitle(f"{bundle['name']}, {size}: {load['requests']} requests", fontsize=11)
    save(figure, path)


def _distribution(axes: Any, samples: dict[str, Any]) -> None:
    for name, values in samples.items():
        ordered = np.sort(values)
        share = 100 * np.arange(1, len(ordered) + 1) / len(ordered)
        axes.step(ordered, share, where="post", color=COLOURS[name], label=name, linewidth=1.6)
    for rank in (50, 95, 99):
        axes.axhline(rank, color="#bbbbbb", linewidth=0.7, zorder=0)
        axes.annotate(f"p{rank}", (1.01, rank), xycoords=("axes fraction", "data"), fontsize=7, va="center")
    axes.set_xscale("log")
    axes.set_ylim(0, 101)
    axes.set_xlabel("milliseconds (log)")
    axes.set_ylabel("% of requests at most")
    axes.set_title("distribution", fontsize=10)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _stack(axes: Any, samples: dict[str, Any]) -> None:
    order = np.argsort(samples["whole"], kind="stable")
    requests = np.arange(len(order))
    bottom = np.zeros(len(order))
    for name in PARTS:
        top = bottom + samples[name][order]
        axes.fill_between(requests, bottom, top, color=COLOURS[name], label=name, linewidth=0, step="mid")
        bottom = top
    axes.plot(requests, samples["whole"][order], color=COLOURS["whole"], linewidth=1.0, label="whole")
    axes.set_xlim(0, max(1, len(order) - 1))
    axes.set_ylim(0, None)
    axes.set_xlabel("requests, fastest first")
    axes.set_ylabel("milliseconds")
    axes.set_title("components", fontsize=10)


def _new_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "drawing needs matplotlib, which is not installed: pip install matplotlib"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: str | Path) -> None:
    """Writes a figure with nothing in it that changes from run to run.

    Raises:
        JobError: The disk refused.
    """
    import matplotlib as mpl

    path = Path(path)
    dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context({"svg.hashsalt": "onetrans", "svg.fonttype": "none", "font.family": "DejaVu Sans"}):
            figure.savefig(path, dpi=120, metadata=dates.get(path.suffix))
    except OSError as error:
        raise JobError(f"{path} could not be drawn: {error}") from error
