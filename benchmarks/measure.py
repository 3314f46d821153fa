"""What every measure gives back: rows with a target, a prediction made before measuring, and the outcome."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onetrans.bench.run import quiet_collector
from onetrans.bench.stats import LEAST_PAIRS, Estimate

SPINNING = 0.06  # seconds; ONNX Runtime's workers were seen to spin for 0.042 s after a run


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure.

    Attributes:
        what: In words.
        unit: Of value, interval, target and prediction; "" for a ratio.
        value: The outcome.
        low: Of its 95% interval; None where there is a single measurement.
        high: Likewise.
        target: What it should be; None where the row only informs.
        at_least: Whether the target is a lower bound.
        prediction: From a reckoning of operations and bytes, before measuring; None where there is none.
        reckoning: How the prediction came about.
    """

    what: str
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


def estimated(estimate: Estimate, *, scale: float = 1.0, **fields: Any) -> Row:
    """A row with an interval, its numbers times `scale`."""
    return Row(value=scale * estimate.value, low=scale * estimate.low, high=scale * estimate.high, **fields)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A measure's outcome: rows, raw samples in seconds by name, what a reader must know, latency records, tables."""

    rows: Sequence[Row]
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    records: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)


def in_turn(
    runs: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 2, pause: float = SPINNING
) -> dict[str, list[float]]:
    """Seconds of every run, A B C A B C …, so that drift of the machine meets all alike.

    Args:
        runs: By name; timed from outside.
        rounds: Measured rounds, at least LEAST_PAIRS.
        warmup: Rounds before, unmeasured.
        pause: Seconds of sleep before each run, so that the threads of the run before have gone to rest.
    """
    assert rounds >= LEAST_PAIRS
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with quiet_collector():
        for index in range(warmup + rounds):
            for name, run in runs.items():
                time.sleep(pause)
                began = time.perf_counter()
                run()
                taken = time.perf_counter() - began
                if index >= warmup:
                    seconds[name].append(taken)
    return seconds
