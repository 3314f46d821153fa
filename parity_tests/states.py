"""What the tests of the state cache share: users with long histories, the reference, and a backend that is watched."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from onetrans.export.models.onetrans import run_model
from onetrans.features.encoder import RequestEncoder
from onetrans.features.merge import Merge
from onetrans.features.requests import Request
from onetrans.features.schema import FeatureSchema
from onetrans.model.onetrans import OneTrans
from onetrans.parity.bound import bound
from onetrans.runtime import Ranker, Scores
from onetrans.runtime.backends.base import Backend, BackendOptions
from onetrans.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.cache.config import CacheConfig
from onetrans.runtime.cache.lookup import CacheEntry
from onetrans.runtime.cache.state_cache import Key
from onetrans.runtime.metrics import Metrics
from onetrans.runtime.pools.host import HostPool
from parity_tests.conftest import rehash, request_of

Logits = Mapping[str, np.ndarray]
CALIBRATION = 100


def cached(
    bundle: Bundle, backend: Backend, *, slots: int, metrics: Metrics | None = None, **config: Any
) -> tuple[Ranker, HostPool]:
    """A Ranker with memory for so many states, and its slabs."""
    memory = slots * bundle.manifest.bytes_per_user
    ranker = Ranker(bundle, backend, CacheConfig(state_memory=memory, **config), metrics)
    assert isinstance(ranker.pool, HostPool)
    return ranker, ranker.pool


def people(
    schema: FeatureSchema, names: Iterable[str], *, events: int = 400, candidates: int = 3
) -> dict[str, Request]:
    """Users with their whole lives ahead of them: take `upto` of one."""
    return {
        name: dataclasses.replace(request_of(schema, events=events, candidates=candidates, seed=seed), user=name)
        for seed, name in enumerate(names)
    }


def upto(request: Request, events: int, candidates: int | None = None) -> Request:
    """The request as it was after so many events, with the first so many candidates."""
    history, offered = (cast(Mapping[str, Any], part) for part in (request.history, request.candidates))
    return dataclasses.replace(
        request,
        history={name: column[:events] for name, column in history.items()},
        candidates={name: column[:candidates] for name, column in offered.items()},
    )


def rank(ranker: Ranker, request: Request) -> Scores:
    return ranker.rank(
        history=request.history, profile=request.profile, candidates=request.candidates, user=request.user
    )


def rank_new(ranker: Ranker, request: Request) -> Scores:
    """Prefilled into a slot of its own by the same bundle and backend, whatever is cached."""
    return rank(ranker, dataclasses.replace(request, user=""))


def same_bits(a: Logits, b: Logits) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[task], b[task]) for task in a)


def contents(ranker: Ranker) -> dict[Key, dict[str, np.ndarray]]:
    """Every cached state, byte by byte: valid rows and all else that decode reads."""
    return {key: ranker.pool.read(entry.slot) for key, entry in ranker.cache.entries().items()}


def same_contents(a: Mapping[Key, Logits], b: Mapping[Key, Logits]) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)


def entry_of(ranker: Ranker, user: str) -> CacheEntry:
    (found,) = [entry for (_, name), entry in ranker.cache.entries().items() if name == user]
    return found


class Reference:
    """The model in one pass over the whole history, with no cache and no split: in float64, and as it is.

    A score may be FACTOR times further from float64 than the largest error of the plain float32 model, plus FLOOR_ULP
    units in the last place of the request's largest logit: the formula of `onetrans.parity.bound`. The error of the
    plain model is taken over all requests so far, the first CALIBRATION of them random ones, since that of a single
    logit is zero by luck now and then.
    """

    def __init__(self, model: OneTrans) -> None:
        self.model, self.gold_model = model, copy.deepcopy(model).double()
        config = model.config
        self.encoder = RequestEncoder(schema=config.schema, merge=cast(Merge, config.merge), pyramid=config.pyramid)
        self.error = self.worst = 0.0
        for seed in range(CALIBRATION):
            self.gold(request_of(model.config.schema, events=4 * seed, candidates=3, seed=1000 + seed))

    def gold(self, request: Request) -> dict[str, np.ndarray]:
        """Logits in float64 [C]; the plain model's error is taken along."""
        inputs = self.encoder.inputs([self.encoder.parse(request)])
        gold = {task: logits[0] for task, logits in run_model(self.gold_model, inputs).items()}
        plain = {task: logits[0] for task, logits in run_model(self.model, inputs).items()}
        self.error = max(self.error, difference(plain, gold))
        return gold

    def bound(self, gold: Logits) -> float:
        largest = max(float(np.abs(value).max()) for value in gold.values())
        return bound(self.error, largest, "float32")

    def check(self, logits: Logits, gold: Logits) -> None:
        error, bound = difference(logits, gold), self.bound(gold)
        assert error <= bound, f"{error:.2e} from the reference where {bound:.2e} is allowed"
        self.worst = max(self.worst, error)

    def check_request(self, scores: Scores, request: Request) -> None:
        self.check(scores.logits, self.gold(request))


def difference(a: Logits, b: Logits) -> float:
    """Of two requests' logits the largest, NaN where there is one."""
    assert {task: value.shape for task, value in a.items()} == {task: value.shape for task, value in b.items()}
    return float(np.max([np.abs(a[task] - b[task]).max() for task in a]))


class Watched(OnnxRuntimeCpu):
    """The backend, telling when a graph has run and its outputs are written, but nothing came of it yet."""

    ran: Callable[[str], None] = staticmethod(lambda graph: None)

    def __init__(self, bundle: Bundle, options: BackendOptions | None = None) -> None:
        super().__init__(bundle, options)
        self._sessions = {name: _Session(self, name, session) for name, session in self._sessions.items()}


class _Session:
    def __init__(self, backend: Watched, graph: str, session: Any) -> None:
        self._backend, self._graph, self._session = backend, graph, session

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._session, name)
        if not name.startswith("run"):
            return found

        def run(*args: Any) -> Any:
            made = found(*args)
            self._backend.ran(self._graph)
            return made

        return run


def retrained(bundle: Path, folder: Path) -> Path:
    """The bundle with other weights: each number moved by up to a twentieth, and equal ones alike."""
    shutil.copytree(bundle, folder)
    path = folder / "weights.safetensors"
    content = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8:end]).items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            first, last = (end + offset for offset in entry["data_offsets"])
            weights = np.frombuffer(content[first:last], np.float32)
            moved = weights * (1 + 0.05 * np.sin(20 * weights))
            content[first:last] = moved.astype(np.float32).tobytes()
    path.write_bytes(content)
    rehash(folder)
    return folder
