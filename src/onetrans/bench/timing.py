"""Timing of what a torch device runs: contestants in turn, block by block; by events around graph replays on a GPU.

This module needs torch; nothing else of `onetrans.bench` does.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from onetrans.bench.run import quiet_collector
from onetrans.bench.stats import LEAST_PAIRS, Estimate, median, median_ratio

BLOCKS = 10
REPEATS = 8  # most of a block
BLOCK_SECONDS = 4e-3  # what a contestant's share of a block takes at most, beyond LEAST_REPEATS
LEAST_REPEATS = 3
FLUSH_TIMES = 4  # the buffer that is read between replays, in times of the L2 cache
METHOD = (
    "CUDA events around each replay; contestants in turn, block by block; before every replay a buffer of"
    f" {FLUSH_TIMES} times the L2 cache is read, so that inputs and weights come from device memory; what Python calls"
    " (eager and torch.compile of whole programs) bears its launching, as far as that read does not hide it; the rest"
    " are CUDA graphs"
)

Samples = Sequence[Sequence[float]]  # seconds of each call, block by block
Blocks = dict[str, list[list[float]]]  # the samples of each contestant


@dataclass(frozen=True, kw_only=True)
class Run:
    """Something to time: `go` launches it, `calls` times the computation; `kept` must stay alive."""

    go: Callable[[], Any]
    calls: int = 1
    kept: Sequence[Any] = field(default_factory=tuple)


class Timer(Protocol):
    """What a measure needs of a timer."""

    def graph(self, calls: Sequence[Callable[[], Any]]) -> Run:
        """The calls, in sequence, as one thing to launch; `kept[1]` is what they return."""

    def plain(self, call: Callable[[], Any]) -> Run:
        """A call as Python makes it."""

    def blocks(self, runs: Mapping[Any, Run], count: int = BLOCKS) -> dict[Any, list[list[float]]]:
        """Seconds per call, A B C A B C …, so many blocks of each."""


class CudaTimer:
    """Times on the current CUDA device."""

    def __init__(self) -> None:
        size = FLUSH_TIMES * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._filler = torch.rand(max(1 << 20, size // 4), device="cuda")
        self._sum = torch.empty((), device="cuda")

    def graph(self, calls: Sequence[Callable[[], Any]]) -> Run:
        """Warms up on a side stream, then captures; `kept` holds what calls return, in the graph's memory, and take."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        captured, outside = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(captured):
                kept = [call() for call in calls]
        finally:
            torch.cuda.set_stream(outside)  # a capture that fails leaves its own stream current
        captured.replay()
        torch.cuda.synchronize()
        return Run(go=captured.replay, calls=len(calls), kept=(captured, kept, calls))

    def plain(self, call: Callable[[], Any]) -> Run:
        """Warms up."""
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        return Run(go=call)

    def blocks(self, runs: Mapping[Any, Run], count: int = BLOCKS) -> dict[Any, list[list[float]]]:
        """See `METHOD`; fewer repeats of what takes longer."""
        with quiet_collector():
            repeats = {}
            for name, run in runs.items():
                self._sample(run, 2)
                once = min(self._sample(run, LEAST_REPEATS)) * run.calls
                repeats[name] = max(LEAST_REPEATS, min(REPEATS, int(BLOCK_SECONDS / once)))
            found: dict[Any, list[list[float]]] = {name: [] for name in runs}
            for _ in range(count):
                for name, run in runs.items():
                    found[name].append(self._sample(run, repeats[name]))
        return found

    def _sample(self, run: Run, repeats: int) -> list[float]:
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for begin, end in marks:
            torch.sum(self._filler, dim=0, out=self._sum)
            begin.record()
            run.go()
            end.record()
        torch.cuda.synchronize()
        return [1e-3 * begin.elapsed_time(end) / run.calls for begin, end in marks]


class HostTimer:
    """A rehearsal's: each thing runs once, and stands for as many blocks as statistics ask for."""

    def graph(self, calls: Sequence[Callable[[], Any]]) -> Run:
        """The first call alone, run once."""
        return self.plain(calls[0])

    def plain(self, call: Callable[[], Any]) -> Run:
        """The call."""
        return Run(go=call, kept=(None, [call()]))

    def blocks(self, runs: Mapping[Any, Run], count: int = BLOCKS) -> dict[Any, list[list[float]]]:
        """One sample each, repeated."""
        found = {}
        for name, run in runs.items():
            began = time.perf_counter()
            run.go()
            found[name] = [[time.perf_counter() - began]] * LEAST_PAIRS
        return found


def per_block(blocks: Samples) -> list[float]:
    """The median of each block."""
    return [statistics.median(block) for block in blocks]


def typical(blocks: Samples) -> Estimate:
    """The median over blocks, in seconds."""
    return median(per_block(blocks))


def times_faster(ours: Samples, theirs: Samples) -> Estimate:
    """How many times faster ours is: the median of theirs over ours, block by block."""
    return median_ratio(per_block(theirs), per_block(ours))


def microseconds(blocks: Blocks) -> dict[str, list[list[float]]]:
    """Raw samples as a record keeps them: microseconds, to a hundredth."""
    return {name: [[round(1e6 * value, 2) for value in block] for block in parts] for name, parts in blocks.items()}


def set_aside() -> None:
    """Takes all that lives now out of the garbage collector's search, which would take longer than a measurement."""
    gc.collect()
    gc.freeze()


def clear() -> None:
    """Gives back what measures left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def kernel_times(go: Callable[[], Any], rounds: int = 5) -> list[list[str]]:
    """Kernel, launches and microseconds of one run, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    go()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(rounds):
            go()
        torch.cuda.synchronize()
    rows = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
    body = [
        [event.key[:80], f"{event.count / rounds:g}", f"{event.self_device_time_total / rounds:.1f}"]
        for event in rows
        if event.self_device_time_total
    ]
    return [["kernel", "launches", "µs"], *body[:20]]
