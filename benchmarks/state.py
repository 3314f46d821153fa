"""What keeping states is worth: append against prefill, its growth, returning users, and where a state may wait."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.context import SEED, Context
from benchmarks.measure import SPINNING, Measured, Row, estimated, in_turn
from benchmarks.node_times import node_times
from onetrans.bench.run import quiet_collector
from onetrans.bench.stats import median, median_ratio, percentiles
from onetrans.errors import JobError
from onetrans.features.encode import encode_candidates, encode_tokens, encode_users
from onetrans.features.merge import merge_tokens, parse_history
from onetrans.features.random_requests import first_events, random_request
from onetrans.features.requests import Request
from onetrans.runtime.backends.base import BackendOptions, StatePool
from onetrans.runtime.cache.config import CacheConfig
from onetrans.runtime.cache.lookup import Held
from onetrans.runtime.cache.spill import SpillFile, SpillPrecision
from onetrans.runtime.manifest import WEIGHTS_FILE
from onetrans.runtime.ranker import Ranker
from onetrans.runtime.tensors import read_tensors

HISTORY, FRESH = 1100, 8
TARGET = 20.0
ROUNDS = 40
# A neighbour's burst on the host lasts seconds, in which an append, which needs the cache, took 4.4 instead of 2.7 ms.
PASSES, PASS_ROUNDS, BREAK = 8, 10, 3.0
GROWTH = tuple(range(131, 1190, 128))  # off every other size in the graph, so that a window shows by its length
RETURNING, APPENDED, CANDIDATES = 208, 4, 100
ALLOWED = 1e-5  # relative, of scores: what the bundle's parity is held to
TIER_LENGTHS = {"tiny": (64, 96, 127), "onetrans-s": (128, 512, 1152), "onetrans-l": (128, 512, 1152)}
TIER_FRESH = (1, 8, 63)  # 64 always cross an anchor of 64
TIER_ROUNDS = 7


@dataclasses.dataclass(frozen=True, eq=False)
class OneUser:
    """A random user with a long history, and slots to compute in."""

    ranker: Ranker
    pool: StatePool
    request: Request
    tokens: dict[str, Any]
    profile: dict[str, Any]

    def inputs(self, first: int, last: int) -> dict[str, Any]:
        """User-scope inputs with the events from `first` up to `last`."""
        schema = self.ranker.bundle.manifest.schema
        known = {name: column[:last] for name, column in self.tokens.items()}
        return {**encode_tokens(schema, [known], [first]), **self.profile}

    def prefill(self, slot: int, events: int) -> Callable[[], None]:
        """Computes the state of so many events, the encoding apart."""
        inputs = self.inputs(self.ranker.bundle.manifest.pyramid.key_starts(events)[0], events)
        return lambda: self.ranker.backend.prefill(self.pool, [slot], inputs)

    def append(self, slot: int, before: int, after: int) -> Callable[[], None]:
        """Appends to the state that the slot holds now; can be run again and again."""
        inputs, held = self.inputs(before, after), self.pool.lengths(slot).copy()

        def run() -> None:
            self.pool.lengths(slot)[:] = held
            self.ranker.backend.append(self.pool, [slot], inputs)

        return run

    def scores(self, slot: int) -> Any:
        """Logits of the request's candidates, all tasks in a row."""
        inputs, counts = encode_candidates(self.ranker.bundle.manifest.schema, [self.request.candidates])
        made = self.ranker.backend.decode(self.pool, [slot], {**self.profile, **inputs}, counts)
        return np.concatenate([value[0] for value in made.values()])


def one_user(context: Context, preset: str, events: int, slots: int = 2) -> OneUser:
    """Opens the preset's bundle and makes a user."""
    ranker = Ranker.open(context.bundle(preset), options=BackendOptions(threads=context.threads))
    schema = ranker.bundle.manifest.schema
    request = random_request(schema, events=events, candidates=CANDIDATES, rng=np.random.default_rng(SEED))
    tokens = merge_tokens(schema, parse_history(schema, request.history), "time")
    return OneUser(ranker, ranker.backend.allocate(slots), request, tokens, encode_users(schema, [request.profile]))


def append(context: Context) -> Measured:
    """Append of 8 events to 1100 against a prefill of 1108."""
    user = one_user(context, context.large, HISTORY + FRESH)
    user.prefill(0, HISTORY)()
    runs = {"append": user.append(0, HISTORY, HISTORY + FRESH), "prefill": user.prefill(1, HISTORY + FRESH)}
    for run in runs.values():
        run()
    _agree("append", user.scores(0), user.scores(1))
    predicted, reckoning = _predict(user, context)
    context.progress(f"predicted: append {1e3 * predicted:.1f} ms")
    rows, samples = [], {}
    # The backend's threads do not spin on after a run, so nothing asks for a pause; after one, they must wake up.
    ways = {"on a busy machine": 0.0, f"each after {1e3 * SPINNING:.0f} ms of idleness": SPINNING}
    taken: dict[str, dict[str, list[float]]] = {when: {name: [] for name in runs} for when in ways}
    passes = 1 if context.quick else PASSES
    for index in range(passes):
        context.progress(f"pass {index + 1} of {passes}")
        time.sleep(BREAK)
        for when, pause in ways.items():
            for name, values in in_turn(runs, rounds=context.rounds(PASS_ROUNDS), pause=pause).items():
                taken[when][name] += values
    for when, seconds in taken.items():
        samples |= {f"{name}, {when}": values for name, values in seconds.items()}
        rows += [
            estimated(
                median_ratio(seconds["prefill"], seconds["append"]),
                what=f"prefill of {HISTORY + FRESH} events over an append of {FRESH} to {HISTORY}, {when}",
                unit="",
                target=TARGET,
                at_least=True,
            ),
            estimated(
                median(seconds["append"]),
                scale=1e3,
                what=f"append of {FRESH} events to {HISTORY}, {when}, median",
                unit="ms",
                prediction=1e3 * predicted,
                reckoning=reckoning,
            ),
            estimated(
                median(seconds["prefill"]),
                scale=1e3,
                what=f"prefill of {HISTORY + FRESH} events, {when}, median",
                unit="ms",
            ),
        ]
    return Measured(
        rows=rows,
        samples=samples,
        notes=["scores after either agree to 1e-5; both timed in turn, in passes seconds apart"],
    )


def _predict(user: OneUser, context: Context) -> tuple[float, str]:
    """Seconds of an append that does nothing but move its bytes: products' weights once, past windows five times."""
    bundle = user.ranker.bundle
    graph = bundle.manifest.graphs["append"]
    past = {spec.name.removeprefix("past_") for spec in graph.inputs}
    state = sum(value.nbytes for name, value in user.pool.read(0).items() if name in past)
    read = {name: value.nbytes for name, value in read_tensors(bundle.contents[WEIGHTS_FILE], WEIGHTS_FILE).items()}
    weights = sum(size for name, size in read.items() if name in graph.weights and not name.startswith("embeddings."))
    return (
        (weights + 5 * state) / context.machine.bandwidth,
        f"({weights / 1e6:.1f} MB of weights + 5 × {state / 1e6:.1f} MB of past: joined, transposed, read) / bandwidth",
    )


def append_growth(context: Context) -> Measured:
    """Append of 8 events as the history grows: the whole, and the nodes that no window enters, by ONNX Runtime's clock.

    A node counts as attention where one of its inputs or outputs has a layer's window as a size.
    """
    user = one_user(context, context.large, max(GROWTH) + FRESH)
    windows = user.ranker.bundle.manifest.pyramid
    runs, attended, outside = {}, {}, {}
    for events in GROWTH:
        context.progress(f"{events} events")
        user.prefill(0, events)()
        lengths = user.pool.lengths(0).tolist()
        attended[events] = sum(lengths[: len(windows.keep) - 1])
        widths = {width for length in lengths for width in (length, length + FRESH)}
        values = {f"past_{name}": value for name, value in user.pool.read(0).items()}
        values |= user.inputs(events, events + FRESH)
        timed = node_times(
            user.ranker.bundle, "append", values, threads=context.threads, runs=context.rounds(ROUNDS), sizes=widths
        )
        outside[events] = timed.outside
        runs[f"append_{events}"] = [a + b for a, b in zip(timed.inside, timed.outside, strict=True)]
    whole = {events: float(np.median(runs[f"append_{events}"])) for events in GROWTH}
    slope, intercept = np.polyfit(list(attended.values()), list(whole.values()), 1)
    rest = {events: float(np.median(values)) for events, values in outside.items()}
    growth, _ = np.polyfit(GROWTH, list(rest.values()), 1)
    first, last = GROWTH[0], GROWTH[-1]
    rows = [
        estimated(
            median_ratio(outside[last], outside[first]),
            what=f"append of {FRESH}, nodes outside attention: {last} events over {first}",
            unit="",
        ),
        Row(
            what=f"append of {FRESH}, nodes outside attention, per 1000 events of history (fitted)",
            unit="ms",
            value=1e6 * float(growth),
        ),
        Row(
            what=f"append of {FRESH}, all nodes: at no history (fitted)",
            unit="ms",
            value=1e3 * float(intercept),
        ),
        Row(
            what=f"append of {FRESH}, all nodes: per 1000 tokens attended, all layers together (fitted)",
            unit="ms",
            value=1e6 * float(slope),
        ),
    ]
    head = ["events before", "tokens attended", "all nodes, ms", "outside attention, ms"]
    table = [[str(e), str(attended[e]), f"{1e3 * whole[e]:.2f}", f"{1e3 * rest[e]:.2f}"] for e in GROWTH]
    samples = runs | {f"outside_{events}": values for events, values in outside.items()}
    return Measured(
        rows=rows,
        samples=samples,
        tables={f"Append of {FRESH} events as the history grows ({context.large})": [head, *table]},
        notes=["sums of ONNX Runtime's node times while it profiles, which adds to each node"],
    )


def returning(context: Context) -> Measured:
    """A returning user's request, append 4 and decode 100, against prefill and decode of the same request, in turn."""
    path = context.bundle(context.large)
    plain = Ranker.open(path, options=BackendOptions(threads=context.threads))
    manifest = plain.bundle.manifest
    memory = CacheConfig(state_memory=8 * manifest.bytes_per_user)
    cached = Ranker.open(path, options=BackendOptions(threads=context.threads), cache=memory)
    chunk = manifest.pyramid.chunk
    base = HISTORY - HISTORY % chunk + 1
    per_anchor = (chunk - 2) // APPENDED
    rng = np.random.default_rng(SEED)
    full = random_request(manifest.schema, events=base + chunk, candidates=CANDIDATES, rng=rng)
    count = 3 * per_anchor if context.quick else -(-RETURNING // per_anchor) * per_anchor
    seconds: dict[str, list[float]] = {"append + decode": [], "prefill + decode": []}

    def ranked(ranker: Ranker, events: int) -> tuple[Any, float]:
        request = first_events(full, events, user="returning")
        time.sleep(SPINNING)
        began = time.perf_counter()
        (scores,) = ranker.rank_batch([request])
        return scores, time.perf_counter() - began

    with quiet_collector():
        for index in range(count):
            turn = index % per_anchor
            if turn == 0:
                context.progress(f"{index} of {count} requests")
                cached.invalidate("returning")
                ranked(cached, base)
            events = base + APPENDED * (turn + 1)
            (mine, with_state), (theirs, without) = ranked(cached, events), ranked(plain, events)
            if (mine.result, mine.fresh, theirs.result) != ("append", APPENDED, "prefill"):
                raise JobError(f"the requests were answered by {mine.result} and {theirs.result}")
            _agree("a returning user", *(np.concatenate(list(s.logits.values())) for s in (mine, theirs)))
            seconds["append + decode"].append(with_state)
            seconds["prefill + decode"].append(without)
    rows = [
        estimated(
            median_ratio(seconds["prefill + decode"], seconds["append + decode"]),
            what=f"prefill and decode over append of {APPENDED} and decode, {CANDIDATES} candidates, whole requests",
            unit="",
        )
    ]
    for name, values in seconds.items():
        for rank, estimate in percentiles(values).items():
            rows.append(estimated(estimate, scale=1e3, what=f"{name}, whole request, {rank}", unit="ms"))
    return Measured(rows=rows, samples=seconds, notes=[f"{count} requests of {base} to {base + chunk} events"])


def tiers(context: Context) -> Measured:
    """What prefill, append, and loading a state from host memory and from a disk cost, by model and history."""
    head = ["model, events", "MB", "prefill", *(f"append {n}" for n in TIER_FRESH)]
    head += ["host memory", "disk", "disk, float16", "prefill / host", "prefill / disk", "pays from MB/s"]
    table, worst = [head], float("inf")
    samples: dict[str, list[float]] = {}
    errors: dict[str, float] = {}
    for preset, lengths in TIER_LENGTHS.items():
        if context.quick and preset == "onetrans-l":
            continue
        user = one_user(context, preset, max(lengths) + max(TIER_FRESH))
        for events in lengths:
            context.progress(f"{preset}, {events} events")
            cost, size, error = _tier_costs(user, events, context)
            ms = {name: 1e3 * float(np.median(values)) for name, values in cost.items()}
            samples |= {f"{preset} {events} {name}": values for name, values in cost.items()}
            errors[preset] = max(error, errors.get(preset, 0.0))
            gain = ms["prefill"] / ms["disk"]
            worst = min(worst, gain) if preset == context.large else worst
            row = [f"{preset}, {events}", f"{size / 1e6:.2f}", *(f"{value:.2f}" for value in ms.values())]
            row += [f"{ms['prefill'] / ms['host']:.0f}", f"{gain:.1f}", f"{size / 1e3 / ms['prefill']:.0f}"]
            table.append(row)
    rows = [Row(what=f"{context.large}: prefill over loading from disk, least of its histories", unit="", value=worst)]
    rows += [
        Row(what=f"{preset}: relative error of scores after a state was kept in float16", unit="", value=error)
        for preset, error in errors.items()
    ]
    return Measured(
        rows=rows,
        samples=samples,
        tables={"Where a state may wait, ms (medians)": table},
        notes=[
            "appends to the last anchor at or below the history",
            "disk: a file whose pages were dropped from memory before each read",
            "pays from: a tier that delivers a state at this rate takes as long as its prefill; overheads apart",
        ],
    )


def _tier_costs(user: OneUser, events: int, context: Context) -> tuple[dict[str, list[float]], int, float]:
    """Seconds by way, the state's bytes, and the scores' relative error after half precision."""
    manifest = user.ranker.bundle.manifest
    user.prefill(0, events)()
    exact, state = user.scores(0), user.pool.read(0)
    size = sum(value.nbytes for value in state.values())
    runs: dict[str, Callable[[], Any]] = {"prefill": user.prefill(1, events)}
    pool = user.pool
    grown = dataclasses.replace(user, pool=user.ranker.backend.allocate(1))
    before = events - events % manifest.pyramid.chunk
    grown.prefill(0, before)()
    for fresh in TIER_FRESH:
        runs[f"append {fresh}"] = grown.append(0, before, before + fresh)
    runs["host"] = lambda: pool.write(1, state)
    seconds = in_turn(runs, rounds=context.rounds(TIER_ROUNDS))
    error = 0.0
    held = Held(slot=0, tokens=events, events=b"", context=b"")
    for name, precision in (("disk", "same"), ("disk, float16", "float16")):
        seconds[name] = []
        with _spill(user, precision) as spill:  # type: ignore[arg-type]
            for _ in range(context.rounds(TIER_ROUNDS)):
                spill.put(("", "user"), held, state)
                _drop_pages(spill.descriptor)
                time.sleep(SPINNING)
                began = time.perf_counter()
                loaded = spill.take(("", "user"))
                assert loaded is not None
                pool.write(1, loaded)
                seconds[name].append(time.perf_counter() - began)
        found = user.scores(1)
        error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
        if precision == "same" and error:
            raise JobError("a state that came back from the disk is another one")
    return seconds, size, error


@contextlib.contextmanager
def _spill(user: OneUser, precision: SpillPrecision) -> Iterator[SpillFile]:
    manifest = user.ranker.bundle.manifest
    with tempfile.TemporaryDirectory(prefix="onetrans-spill-") as folder:
        spill = SpillFile(manifest, Path(folder), 2 * manifest.bytes_per_user, precision)
        try:
            yield spill
        finally:
            spill.close()


def _drop_pages(descriptor: int) -> None:
    """Leaves nothing of the file in memory."""
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _agree(what: str, found: Any, expected: Any) -> None:
    """No figure of speed from scores that are wrong."""
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    if not error <= ALLOWED:
        raise JobError(f"{what}: scores are {error:.1e} from those of a prefill, {ALLOWED:.0e} is allowed")
