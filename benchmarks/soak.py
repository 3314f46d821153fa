"""A long run: many users, too little memory, several threads, every score checked."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.context import SEED, Context
from benchmarks.measure import Measured, Row
from onetrans.features.random_requests import first_events, random_request
from onetrans.runtime.backends.base import BackendOptions
from onetrans.runtime.cache.config import CacheConfig
from onetrans.runtime.ranker import Ranker

REQUESTS, THREADS = 100_000, 4
USERS, CACHED = 400, 100
EVENTS, CANDIDATES = 300, 5
MEAN_FRESH = 1.5
SAMPLE_EVERY = 500
FLAT = 0.02


@dataclasses.dataclass
class _Traffic:
    """Who asks next and with how many events; each user's history grows and begins anew when it is at its end."""

    rng: np.random.Generator
    lengths: np.ndarray
    asked: int
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def next(self) -> tuple[int, int, int] | None:
        """User, events and turn."""
        with self.lock:
            if self.asked == 0:
                return None
            self.asked -= 1
            user = min(int(self.rng.zipf(1.3)) - 1, int(self.rng.integers(USERS)))
            grown = int(self.lengths[user] + self.rng.poisson(MEAN_FRESH))
            self.lengths[user] = grown if grown <= EVENTS else 0
            return user, int(self.lengths[user]), self.asked


def soak(context: Context) -> Measured:
    """100,000 mixed requests on tiny: wrong scores, memory in the second half, integrity while it runs."""
    path = context.bundle(context.small)
    plain = Ranker.open(path, options=BackendOptions(threads=1))
    manifest = plain.bundle.manifest
    cached = Ranker.open(
        path, options=BackendOptions(threads=1), cache=CacheConfig(state_memory=CACHED * manifest.bytes_per_user)
    )
    # Each side may be this far from gold, so they may be twice as far from each other.
    allowed = 2 * max(result["bound"] for result in manifest.parity["results"])
    rng = np.random.default_rng(SEED)
    users = [random_request(manifest.schema, events=EVENTS, candidates=CANDIDATES, rng=rng) for _ in range(USERS)]
    total = 2_000 if context.quick else REQUESTS
    traffic = _Traffic(rng, rng.integers(0, EVENTS, USERS), total)
    worst, wrong, memory = [0.0], [0], []
    results: dict[str, int] = {}
    lock, over = threading.Lock(), threading.Event()

    def work() -> None:
        while (turn := traffic.next()) is not None:
            user, events, left = turn
            request = first_events(users[user], events, user=f"user {user}")
            (mine,), (theirs,) = cached.rank_batch([request]), plain.rank_batch([request])
            error = max(float(np.abs(mine.logits[task] - theirs.logits[task]).max()) for task in theirs.logits)
            with lock:
                worst[0] = max(worst[0], error)
                wrong[0] += not error <= allowed
                results[mine.result] = results.get(mine.result, 0) + 1
                if left % SAMPLE_EVERY == 0:
                    memory.append(_resident())
                if left % (total // 10) == 0:
                    context.progress(f"{total - left} of {total} requests, {wrong[0]} wrong")

    def watch() -> int:
        checks = 0
        while not over.is_set():
            cached.check_integrity()
            checks += 1
            time.sleep(0.05)
        return checks

    began = time.perf_counter()
    with ThreadPoolExecutor(THREADS + 1) as threads:
        watching = threads.submit(watch)
        workers = [threads.submit(work) for _ in range(THREADS)]
        try:
            for worker in workers:
                worker.result()
        finally:
            over.set()
        checks = watching.result()
    cached.check_integrity()
    second = memory[len(memory) // 2 :]
    rows = [
        Row(what=f"{total} requests by {THREADS} threads: wrong scores", unit="", value=wrong[0], target=0),
        Row(what="largest difference of a logit from that of a fresh prefill", unit="", value=worst[0], target=allowed),
        Row(
            what="resident memory, second half: greatest over least, less 1",
            unit="",
            value=max(second) / min(second) - 1,
            target=FLAT,
        ),
        Row(what="integrity checks while running, all true", unit="", value=checks),
        *(Row(what=f"answered by {kind}", unit="", value=count) for kind, count in sorted(results.items())),
        Row(what="states evicted", unit="", value=cached.cache.counts["evicted"]),
    ]
    note = (
        f"{USERS} users by a Zipf law, memory for {cached.cache.slots} states of which {cached.cache.capacity} cached;"
        f" {time.perf_counter() - began:.0f} s, each request ranked a second time without a cache"
    )
    return Measured(rows=rows, samples={"resident bytes": [float(value) for value in memory]}, notes=[note])


def _resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
