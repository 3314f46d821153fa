"""What keeping states is worth: append against prefill, its growth, returning users, and where a state may wait."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases.bundles import CANDIDATES
from benchmarks.context import LARGE, SEED, Context
from onetrans.bench.onnx_graphs import node_times
from onetrans.bench.run import SPINNING, in_turn, quiet_collector
from onetrans.bench.suite import Outcome
from onetrans.bench.user import OneUser, agree, one_user
from onetrans.errors import JobError
from onetrans.features.random_requests import first_events, random_request
from onetrans.runtime.cache.lookup import CacheEntry
from onetrans.runtime.cache.offload import OffloadFile
from onetrans.runtime.manifest import WEIGHTS_FILE
from onetrans.runtime.ranker import Ranker
from onetrans.runtime.tensors import read_tensors

HISTORY, FRESH = 1100, 8
TARGET = 20.0
ROUNDS = 40
# A neighbour's burst on the host lasts seconds, in which an append, which needs the cache, took 4.4 instead of 2.7 ms.
BURSTS, BURST_ROUNDS, BREAK = 8, 10, 3.0
GROWTH = tuple(range(131, 1190, 128))  # off every other size in the graph, so that a window shows by its length
RETURNING, APPENDED = 208, 4
TIER_LENGTHS = {"tiny": (64, 96, 127), "onetrans-s": (128, 512, 1152), "onetrans-l": (128, 512, 1152)}
TIER_FRESH = (1, 8, 63)  # 64 always cross an anchor of 64
TIER_ROUNDS = 7


def append(context: Context) -> Outcome:
    """Append of 8 events to 1100 against a prefill of 1108, in turn, in rounds seconds apart."""
    user, total = one_user(context.ranker(LARGE), HISTORY + FRESH, CANDIDATES), HISTORY + FRESH
    user.prefill(0, HISTORY)()
    runs = {"append": user.append(0, HISTORY, total), "prefill": user.prefill(1, total)}
    for run in runs.values():
        run()
    agree("append", user.scores(0), user.scores(1))
    predicted, reckoning = _predict(user, context)
    context.progress(f"predicted: append {1e3 * predicted:.1f} ms")
    # The backend's threads do not spin on after a run, so nothing asks for a pause; after one, they must wake up.
    pauses = {"on a busy machine": 0.0, f"each after {1e3 * SPINNING:.0f} ms of idleness": SPINNING}
    taken: dict[str, dict[str, list[float]]] = {when: {name: [] for name in runs} for when in pauses}
    bursts = 1 if context.quick else BURSTS
    for index in range(bursts):
        context.progress(f"round {index + 1} of {bursts}")
        time.sleep(BREAK)
        for when, pause in pauses.items():
            for name, values in in_turn(runs, rounds=context.rounds(BURST_ROUNDS), pause=pause).items():
                taken[when][name] += values
    outcome = Outcome(notes=["scores after either agree to 1e-5; both timed in turn, in passes seconds apart"])
    for when, seconds in taken.items():
        outcome.samples |= {f"{name}, {when}": values for name, values in seconds.items()}
        name = f"prefill of {total} events over an append of {FRESH} to {HISTORY}, {when}"
        outcome.ratio(name, seconds["prefill"], seconds["append"], target=TARGET, at_least=True)
        name = f"append of {FRESH} events to {HISTORY}, {when}"
        outcome.milliseconds(name, seconds["append"], predicted, reckoning)
        outcome.milliseconds(f"prefill of {total} events, {when}", seconds["prefill"])
    return outcome


def _predict(user: OneUser, context: Context) -> tuple[float, str]:
    """Seconds of an append that does nothing but move its bytes: products' weights once, past windows five times."""
    graph, contents = user.manifest.graphs["append"], user.ranker.bundle.contents
    past = {spec.identity for spec in graph.inputs if spec.is_window}
    kept = user.pool.read(0)
    state = sum(kept[spec.name].nbytes for spec in user.manifest.state if spec.identity in past)
    read = {name: value.nbytes for name, value in read_tensors(contents[WEIGHTS_FILE], WEIGHTS_FILE).items()}
    weights = sum(size for name, size in read.items() if name in graph.weights and not name.startswith("embeddings."))
    seconds = (weights + 5 * state) / context.machine.copy
    told = f"({weights / 1e6:.1f} MB of weights + 5 × {state / 1e6:.1f} MB of past: joined, transposed, read)"
    return seconds, f"{told} / bandwidth"


def append_growth(context: Context) -> Outcome:
    """Append of 8 events as the history grows: the whole, and the nodes that no window enters, by ONNX Runtime's clock.

    A node counts as attention where one of its inputs or outputs has a layer's window as a size.
    """
    user, outcome = one_user(context.ranker(LARGE), max(GROWTH) + FRESH, CANDIDATES), Outcome()
    attended, whole, rest = {}, {}, {}
    for events in GROWTH:
        context.progress(f"{events} events")
        user.prefill(0, events)()
        lengths = user.pool.lengths(0).tolist()
        attended[events] = sum(lengths[: user.manifest.pyramid.layers - 1])
        widths = {width for length in lengths for width in (length, length + FRESH)}
        kept = {spec.identity: user.pool.read(0)[spec.name] for spec in user.manifest.state}
        graph = user.manifest.graphs["append"]
        values = {spec.name: kept[spec.identity] for spec in graph.inputs if spec.state is not None}
        values |= user.inputs(events, events + FRESH)
        options = {"threads": context.threads, "runs": context.rounds(ROUNDS)}
        inside, outside = node_times(user.ranker.bundle, "append", values, sizes=widths, **options)
        outcome.samples[f"append_{events}"] = [a + b for a, b in zip(inside, outside, strict=True)]
        outcome.samples[f"outside_{events}"] = outside
        whole[events] = float(np.median(outcome.samples[f"append_{events}"]))
        rest[events] = float(np.median(outside))
    slope, intercept = np.polyfit(list(attended.values()), list(whole.values()), 1)
    growth, _ = np.polyfit(GROWTH, list(rest.values()), 1)
    first, last, name = GROWTH[0], GROWTH[-1], f"append of {FRESH}"
    samples = outcome.samples[f"outside_{last}"], outcome.samples[f"outside_{first}"]
    outcome.ratio(f"{name}, nodes outside attention: {last} events over {first}", *samples)
    each = f"{name}, nodes outside attention, per 1000 events of history (fitted)"
    outcome.figure(each, 1e6 * float(growth), "ms")
    outcome.figure(f"{name}, all nodes: at no history (fitted)", 1e3 * float(intercept), "ms")
    each = f"{name}, all nodes: per 1000 tokens attended, all layers together (fitted)"
    outcome.figure(each, 1e6 * float(slope), "ms")
    head = ["events before", "tokens attended", "all nodes, ms", "outside attention, ms"]
    table = [[str(e), str(attended[e]), f"{1e3 * whole[e]:.2f}", f"{1e3 * rest[e]:.2f}"] for e in GROWTH]
    outcome.tables[f"Append of {FRESH} events as the history grows ({LARGE})"] = [head, *table]
    outcome.notes.append("sums of ONNX Runtime's node times while it profiles, which adds to each node")
    return outcome


def returning(context: Context) -> Outcome:
    """A returning user's request, append 4 and decode 100, against prefill and decode of the same request, in turn."""
    plain, cached = context.ranker(LARGE), context.ranker(LARGE, states=8)
    manifest = plain.bundle.manifest
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
            agree("a returning user", *(np.concatenate(list(s.logits.values())) for s in (mine, theirs)))
            seconds["append + decode"].append(with_state)
            seconds["prefill + decode"].append(without)
    outcome = Outcome(samples=dict(seconds), notes=[f"{count} requests of {base} to {base + chunk} events"])
    name = f"prefill and decode over append of {APPENDED} and decode, {CANDIDATES} candidates, whole requests"
    outcome.ratio(name, seconds["prefill + decode"], seconds["append + decode"])
    for name, values in seconds.items():
        outcome.percentiles(f"{name}, whole request", values)
    return outcome


def tiers(context: Context) -> Outcome:
    """What prefill, append, and loading a state from host memory and from a disk cost, by model and history."""
    head = ["model, events", "MB", "prefill", *(f"append {n}" for n in TIER_FRESH)]
    head += ["host memory", "disk", "disk, float16", "prefill / host", "prefill / disk", "pays from MB/s"]
    table, worst, errors, outcome = [head], float("inf"), dict[str, float](), Outcome()
    for model, lengths in TIER_LENGTHS.items():
        if context.quick and model == "onetrans-l":
            continue
        user = one_user(context.ranker(model), max(lengths) + max(TIER_FRESH), CANDIDATES)
        for events in lengths:
            context.progress(f"{model}, {events} events")
            cost, size, error = _tier_costs(user, events, context)
            ms = {name: 1e3 * float(np.median(values)) for name, values in cost.items()}
            outcome.samples |= {f"{model} {events} {name}": values for name, values in cost.items()}
            errors[model] = max(error, errors.get(model, 0.0))
            gain = ms["prefill"] / ms["disk"]
            worst = min(worst, gain) if model == LARGE else worst
            row = [f"{model}, {events}", f"{size / 1e6:.2f}", *(f"{value:.2f}" for value in ms.values())]
            row += [f"{ms['prefill'] / ms['host']:.0f}", f"{gain:.1f}", f"{size / 1e3 / ms['prefill']:.0f}"]
            table.append(row)
    outcome.figure(f"{LARGE}: prefill over loading from disk, least of its histories", worst)
    for model, error in errors.items():
        outcome.figure(f"{model}: relative error of scores after a state was kept in float16", error)
    outcome.tables["Where a state may wait, ms (medians)"] = table
    outcome.notes = [
        "appends to the last anchor at or below the history",
        "disk: a file whose pages were dropped from memory before each read",
        "pays from: a tier that delivers a state at this rate takes as long as its prefill; overheads apart",
    ]
    return outcome


def _tier_costs(user: OneUser, events: int, context: Context) -> tuple[dict[str, list[float]], int, float]:
    """Seconds by way, the state's bytes, and the scores' relative error after half precision."""
    user.prefill(0, events)()
    exact, state, pool = user.scores(0), user.pool.read(0), user.pool
    runs: dict[str, Callable[[], Any]] = {"prefill": user.prefill(1, events)}
    grown = dataclasses.replace(user, pool=user.ranker.backend.allocate(1))
    before = events - events % user.manifest.pyramid.chunk
    grown.prefill(0, before)()
    for fresh in TIER_FRESH:
        runs[f"append {fresh}"] = grown.append(0, before, before + fresh)
    runs["host"] = lambda: pool.write(1, state)
    seconds = in_turn(runs, rounds=context.rounds(TIER_ROUNDS))
    error, key, size = 0.0, ("", "user"), 2 * user.manifest.bytes_per_user
    entry = CacheEntry(slot=0, tokens=events, events=b"", context=b"")
    for name, precision in (("disk", "same"), ("disk, float16", "float16")):
        seconds[name] = []
        with tempfile.TemporaryDirectory(prefix="onetrans-offload-") as folder:
            file = OffloadFile(user.manifest, Path(folder), size, precision)
            for _ in range(context.rounds(TIER_ROUNDS)):
                file.put(key, entry, state)
                os.fsync(file.descriptor)
                os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # leaves nothing of it in memory
                time.sleep(SPINNING)
                began = time.perf_counter()
                loaded = file.take(key)
                assert loaded is not None
                pool.write(1, loaded)
                seconds[name].append(time.perf_counter() - began)
            file.close()
        found = user.scores(1)
        error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
        if precision == "same" and error:
            raise JobError("a state that came back from the disk is another one")
    return seconds, sum(value.nbytes for value in state.values()), error
