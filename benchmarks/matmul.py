"""decode_vs_matmul and prefill_vs_matmul: each graph against nothing but its MatMuls, in turn, in the same process."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.context import SEED, Context
from benchmarks.floor import Floor
from benchmarks.graph_flops import graph_flops
from benchmarks.measure import Measured, Row, estimated, in_turn
from benchmarks.products import Product, decode_products, prefill_products, total_flops
from benchmarks.reckoning import decode_pointwise_bytes, floor_seconds, prefill_pointwise_bytes
from onetrans.bench.stats import median, median_ratio
from onetrans.features.random_requests import random_request
from onetrans.model.config import ModelConfig
from onetrans.runtime.backends.base import BackendOptions, StatePool
from onetrans.runtime.ranker import Ranker

CANDIDATES = 100
ROUNDS = 40
DECODE_TARGET = 1.4
PREFILL_TARGET = 1.5


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A ranker with one full request encoded: inputs of both scopes, a slot for its state, its windows' lengths."""

    ranker: Ranker
    config: ModelConfig
    user: dict[str, Any]
    candidate: dict[str, Any]
    pool: StatePool
    lengths: list[int]

    def prefill(self) -> None:
        """Computes the state."""
        self.ranker.backend.prefill(self.pool, [0], self.user)

    def request(self) -> None:
        """Both."""
        self.prefill()
        self.decode()

    def decode(self) -> dict[str, Any]:
        """Scores the candidates."""
        counts = np.array([next(iter(self.candidate.values())).shape[1]])
        return self.ranker.backend.decode(self.pool, [0], {**self.user, **self.candidate}, counts)

    def graph_flops(self, name: str) -> int:
        """Operations of the products of a graph of the bundle, as it runs on this request."""
        values = {**self.pool.read(0), **self.user, **self.candidate}
        graph = self.ranker.bundle.manifest.graphs[name]
        return graph_flops(self.ranker.bundle, name, {spec.name: values[spec.name] for spec in graph.inputs})


def prepare(context: Context, preset: str, *, candidates: int = CANDIDATES) -> Prepared:
    """Opens the preset's bundle and encodes a random request with a full history."""
    ranker = Ranker.open(context.bundle(preset), options=BackendOptions(threads=context.threads))
    manifest = ranker.bundle.manifest
    config = ModelConfig.from_json(manifest.model)
    rng = np.random.default_rng(SEED)
    request = random_request(manifest.schema, events=config.max_history, candidates=candidates, rng=rng)
    parsed = [ranker.encoder.parse(request)]
    user, candidate = ranker.encoder.user_inputs(parsed), ranker.encoder.candidate_inputs(parsed)[0]
    pool = ranker.backend.allocate(1)
    ranker.backend.prefill(pool, [0], user)
    return Prepared(ranker, config, user, candidate, pool, pool.lengths(0).tolist())


def decode_vs_matmul(context: Context) -> Measured:
    """Decode of 100 candidates against its MatMuls."""
    p = prepare(context, context.large)
    products = decode_products(p.config, lengths=p.lengths, candidates=CANDIDATES)
    floor = floor_seconds(products, context.machine)
    between = decode_pointwise_bytes(p.config, lengths=p.lengths, candidates=CANDIDATES) / context.machine.bandwidth
    prediction = 1 + between / floor
    context.progress(f"predicted: floor {1e3 * floor:.0f} ms, ratio {prediction:.2f}, target {DECODE_TARGET}")
    runs = {
        "decode": p.decode,
        "matmul": Floor(products, threads=context.threads).run,
    }
    seconds = in_turn(runs, rounds=context.rounds(ROUNDS))
    ratio = median_ratio(seconds["decode"], seconds["matmul"])
    by_torch = _torch_seconds(context, products)
    rows = [
        estimated(
            ratio,
            what=f"decode of {CANDIDATES} candidates over its MatMuls alone",
            unit="",
            target=DECODE_TARGET,
            prediction=prediction,
            reckoning="1 + bytes between the products / bandwidth / floor",
        ),
        _milliseconds("decode", seconds["decode"]),
        _milliseconds("decode's MatMuls in ONNX Runtime", seconds["matmul"], floor),
        _milliseconds("the same products in PyTorch", by_torch, floor),
    ]
    return Measured(
        rows=rows, samples={**seconds, "torch": by_torch}, notes=[_work(p, context, "decode", total_flops(products))]
    )


def prefill_vs_matmul(context: Context) -> Measured:
    """Prefill of a full history against its MatMuls, with attention over whole windows and over visible pairs alone."""
    p = prepare(context, context.large)
    whole, visible = (prefill_products(p.config, lengths=p.lengths, visible_only=only) for only in (False, True))
    floors = {"windows": floor_seconds(whole, context.machine), "visible": floor_seconds(visible, context.machine)}
    between = prefill_pointwise_bytes(p.config, lengths=p.lengths) / context.machine.bandwidth
    predictions = {name: (floors["windows"] + between) / floor for name, floor in floors.items()}
    context.progress(
        f"predicted: floor {1e3 * floors['windows']:.0f} ms, ratio {predictions['windows']:.2f}, target"
        f" {PREFILL_TARGET}; visible pairs alone {1e3 * floors['visible']:.0f} ms, ratio {predictions['visible']:.2f}"
    )
    runs = {
        "prefill": p.prefill,
        "windows": Floor(whole, threads=context.threads).run,
        "visible": Floor(visible, threads=context.threads).run,
    }
    seconds = in_turn(runs, rounds=context.rounds(ROUNDS))
    by_torch = _torch_seconds(context, whole)
    names = {"windows": "attention over whole windows", "visible": "attention over visible pairs alone"}
    rows = [
        estimated(
            median_ratio(seconds["prefill"], seconds[name]),
            what=f"prefill of {p.config.max_history} events over its MatMuls, {text}",
            unit="",
            target=PREFILL_TARGET if name == "windows" else None,
            prediction=predictions[name],
            reckoning="(floor of whole windows + bytes between the products / bandwidth) / floor",
        )
        for name, text in names.items()
    ]
    rows += [
        _milliseconds("prefill", seconds["prefill"]),
        *(_milliseconds(f"prefill's MatMuls, {text}", seconds[name], floors[name]) for name, text in names.items()),
        _milliseconds("the same products in PyTorch, whole windows", by_torch, floors["windows"]),
    ]
    return Measured(
        rows=rows, samples={**seconds, "torch": by_torch}, notes=[_work(p, context, "prefill", total_flops(whole))]
    )


def _torch_seconds(context: Context, products: Sequence[Product]) -> list[float]:
    asked = {
        "products": [dataclasses.asdict(product) for product in products],
        "threads": context.threads,
        "rounds": context.rounds(ROUNDS),
    }
    seconds: list[float] = context.module("benchmarks.torch_floor", [], json.dumps(asked))["seconds"]
    return seconds


def _milliseconds(what: str, seconds: Sequence[float], prediction: float | None = None) -> Row:
    return estimated(
        median(seconds),
        scale=1e3,
        what=f"{what}, median",
        unit="ms",
        prediction=None if prediction is None else 1e3 * prediction,
        reckoning="" if prediction is None else "sum over products of max(FLOP / rate, bytes / bandwidth)",
    )


def _work(p: Prepared, context: Context, graph: str, needed: int) -> str:
    done = p.graph_flops(graph)
    return (
        f"windows of {', '.join(map(str, p.lengths))} tokens; {needed / 1e9:.2f} GFLOP needed, the {graph} graph does"
        f" {done / 1e9:.2f} with its padding; machine: {context.machine}"
    )
