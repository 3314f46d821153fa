"""A long run: many users, too little memory, several threads, every score checked."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from onetrans.bench.suite import Outcome
from onetrans.features.random_requests import first_events, random_request
from onetrans.runtime.ranker import Ranker

THREADS, USERS = 4, 400
EVENTS, CANDIDATES = 300, 5
MEAN_FRESH = 1.5
SAMPLE_EVERY = 500
FLAT = 0.02


def soak(plain: Ranker, cached: Ranker, total: int, progress: Callable[[str], None], seed: int = 0) -> Outcome:
    """Mixed requests to a ranker that keeps states and to one that does not, from several threads.

    Counts wrong scores, memory in the second half, and checks of integrity while it runs.
    """
    manifest = plain.bundle.manifest
    # Each side may be this far from the reference, so they may be twice as far from each other.
    allowed = 2 * max(result["bound"] for result in manifest.parity["results"])
    rng = np.random.default_rng(seed)
    users = [random_request(manifest.schema, events=EVENTS, candidates=CANDIDATES, rng=rng) for _ in range(USERS)]
    left = total
    lengths, worst, wrong = rng.integers(0, EVENTS, USERS), 0.0, 0
    memory: list[float] = []
    results: Counter[str] = Counter()
    lock, over = threading.Lock(), threading.Event()

    def next_request() -> tuple[int, int, int] | None:
        """User, events and turn; each user's history grows and begins anew when it is at its end."""
        nonlocal left
        with lock:
            if left == 0:
                return None
            left -= 1
            user = min(int(rng.zipf(1.3)) - 1, int(rng.integers(USERS)))
            grown = int(lengths[user] + rng.poisson(MEAN_FRESH))
            lengths[user] = grown if grown <= EVENTS else 0
            return user, int(lengths[user]), left

    def work() -> None:
        nonlocal worst, wrong
        while (turn := next_request()) is not None:
            user, events, after = turn
            request = first_events(users[user], events, user=f"user {user}")
            (mine,), (theirs,) = cached.rank_batch([request]), plain.rank_batch([request])
            error = max(float(np.abs(mine.logits[task] - theirs.logits[task]).max()) for task in theirs.logits)
            with lock:
                worst = max(worst, error)
                wrong += not error <= allowed
                results[mine.result] += 1
                if after % SAMPLE_EVERY == 0:
                    pages = int(Path("/proc/self/statm").read_text().split()[1])
                    memory.append(float(pages * os.sysconf("SC_PAGE_SIZE")))
                if after % (total // 10) == 0:
                    progress(f"{total - after} of {total} requests, {wrong} wrong")

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
    second, outcome = memory[len(memory) // 2 :], Outcome(samples={"resident bytes": memory})
    outcome.figure(f"{total} requests by {THREADS} threads: wrong scores", wrong, target=0)
    outcome.figure("largest difference of a logit from that of a fresh prefill", worst, target=allowed)
    flat = max(second) / min(second) - 1
    outcome.figure("resident memory, second half: greatest over least, less 1", flat, target=FLAT)
    outcome.figure("integrity checks while running, all true", checks)
    for kind, count in sorted(results.items()):
        outcome.figure(f"answered by {kind}", count)
    outcome.figure("states evicted", cached.cache.counts["evicted"])
    outcome.notes.append(
        f"{USERS} users by a Zipf law, memory for {cached.cache.slots} states of which {cached.cache.capacity} cached;"
        f" {time.perf_counter() - began:.0f} s, each request ranked a second time without a cache"
    )
    return outcome
