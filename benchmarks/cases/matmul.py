"""A request's graphs against nothing but their MatMuls, and the request against forwards without a split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.cases.bundles import CANDIDATES
from benchmarks.context import LARGE, SEED, Context
from benchmarks.reckoning import decode_pointwise_bytes, decode_products, prefill_pointwise_bytes, prefill_products
from onetrans.bench.floor import Floor, new_session
from onetrans.bench.rates import Product, Work, work_of
from onetrans.bench.run import in_turn
from onetrans.bench.suite import Outcome
from onetrans.bench.user import OneUser, one_user
from onetrans.errors import ParityError
from onetrans.model.config import ModelConfig
from onetrans.model.presets import preset

ROUNDS, WHOLE_ROUNDS = 40, 20
DECODE_TARGET, PREFILL_TARGET = 1.4, 1.5
AGREEMENT = 1e-4  # of logits, relative to the largest; a baseline that scores otherwise would be another model
FLOOR = "sum over products of max(FLOP / rate, bytes / bandwidth)"

Arrays = dict[str, NDArray[Any]]


def _prepared(context: Context) -> tuple[OneUser, ModelConfig, int, list[int]]:
    """A user with a full history, prefilled; the model, the user's events, and its windows' lengths."""
    config = preset(LARGE)
    events = config.max_history
    user = one_user(context.ranker(LARGE), events, CANDIDATES, slots=1)
    user.prefill(0, events)()
    return user, config, events, user.pool.lengths(0).tolist()


def _work(products: Sequence[Product]) -> Work:
    return work_of(products, "float32", activations=True)


def decode_vs_matmul(context: Context) -> Outcome:
    """Decode of 100 candidates against its MatMuls, in turn, in the same process."""
    user, config, events, lengths = _prepared(context)
    products = decode_products(config, lengths, CANDIDATES)
    floor = context.machine.in_sequence(_work(products))
    between = decode_pointwise_bytes(config, lengths, CANDIDATES) / context.machine.copy
    prediction = 1 + between / floor
    context.progress(f"predicted: floor {1e3 * floor:.0f} ms, ratio {prediction:.2f}, target {DECODE_TARGET}")
    runs: dict[str, Any] = {"decode": user.decode, "matmul": Floor(products, threads=context.threads).run}
    seconds = in_turn(runs, rounds=context.rounds(ROUNDS))
    outcome = Outcome(samples=dict(seconds), notes=[_done(user, events, lengths, context, "decode", products)])
    reckoning = "1 + bytes between the products / bandwidth / floor"
    name = f"decode of {CANDIDATES} candidates over its MatMuls alone"
    told = {"target": DECODE_TARGET, "prediction": prediction, "reckoning": reckoning}
    outcome.ratio(name, seconds["decode"], seconds["matmul"], **told)
    outcome.milliseconds("decode", seconds["decode"])
    outcome.milliseconds("decode's MatMuls in ONNX Runtime", seconds["matmul"], floor, FLOOR)
    _by_torch(context, outcome, "the same products in PyTorch", products, floor)
    return outcome


def prefill_vs_matmul(context: Context) -> Outcome:
    """Prefill of a full history against its MatMuls, with attention over whole windows and over visible pairs alone."""
    user, config, events, lengths = _prepared(context)
    whole, visible = (prefill_products(config, lengths, visible_only=only) for only in (False, True))
    floors = {n: context.machine.in_sequence(_work(p)) for n, p in (("windows", whole), ("visible", visible))}
    between = prefill_pointwise_bytes(config, lengths) / context.machine.copy
    predictions = {name: (floors["windows"] + between) / floor for name, floor in floors.items()}
    context.progress(
        f"predicted: floor {1e3 * floors['windows']:.0f} ms, ratio {predictions['windows']:.2f}, target"
        f" {PREFILL_TARGET}; visible pairs alone {1e3 * floors['visible']:.0f} ms, ratio {predictions['visible']:.2f}"
    )
    runs = {
        "prefill": user.prefill(0, events),
        "windows": Floor(whole, threads=context.threads).run,
        "visible": Floor(visible, threads=context.threads).run,
    }
    seconds = in_turn(runs, rounds=context.rounds(ROUNDS))
    outcome = Outcome(samples=dict(seconds), notes=[_done(user, events, lengths, context, "prefill", whole)])
    names = {"windows": "attention over whole windows", "visible": "attention over visible pairs alone"}
    reckoning = "(floor of whole windows + bytes between the products / bandwidth) / floor"
    for name, text in names.items():
        target = PREFILL_TARGET if name == "windows" else None
        told = {"target": target, "prediction": predictions[name], "reckoning": reckoning}
        title = f"prefill of {events} events over its MatMuls, {text}"
        outcome.ratio(title, seconds["prefill"], seconds[name], **told)
    outcome.milliseconds("prefill", seconds["prefill"])
    for name, text in names.items():
        outcome.milliseconds(f"prefill's MatMuls, {text}", seconds[name], floors[name], FLOOR)
    _by_torch(context, outcome, "the same products in PyTorch, whole windows", whole, floors["windows"])
    return outcome


def _by_torch(context: Context, outcome: Outcome, name: str, products: Sequence[Product], floor: float) -> None:
    asked = {"products": [vars(product) for product in products], "threads": context.threads}
    job = json.dumps({**asked, "rounds": context.rounds(ROUNDS)})
    seconds: list[float] = context.module("onetrans.bench.floor", [], job)["seconds"]
    outcome.samples["torch"] = seconds
    outcome.milliseconds(name, seconds, floor, FLOOR)


def _done(
    user: OneUser, events: int, lengths: list[int], context: Context, graph: str, products: Sequence[Product]
) -> str:
    needed, done = _work(products).flops, user.graph_flops(graph, user.window(events))
    rates = f"{context.machine.matmul['float32'] / 1e9:.0f} GFLOP/s, {context.machine.copy / 1e9:.1f} GB/s"
    return (
        f"windows of {', '.join(map(str, lengths))} tokens; {needed / 1e9:.2f} GFLOP needed, the {graph} graph does"
        f" {done / 1e9:.2f} with its padding; machine: {rates}"
    )


def request_vs_unsplit(context: Context) -> Outcome:
    """The whole request against one whole forward per candidate, and against one that takes all candidates at once."""
    user, config, events, lengths = _prepared(context)

    def floor(candidates: int) -> float:
        of_user = prefill_products(config, lengths, visible_only=False)
        of_candidates = decode_products(config, lengths, candidates)
        return context.machine.in_sequence(_work([*of_user, *of_candidates]))

    prediction = CANDIDATES * floor(1) / floor(CANDIDATES)
    context.progress(f"predicted: ratio {prediction:.0f} to one forward per candidate")
    every = {**user.window(events), **user.candidates}
    one = {**every, **{name: value[:, :1] for name, value in user.candidates.items()}}
    whole, prefill = _whole_session(context), user.prefill(0, events)
    logits = user.decode()
    _agree("ONNX Runtime, unsplit", _run(whole, every), logits)
    inputs = context.path(f"{LARGE}-one.npz")
    np.savez(inputs, **one)
    job = {"preset": LARGE, "seed": SEED, "inputs": str(inputs), "threads": context.threads}
    with context.server("benchmarks.contestants.unsplit", ["eager"]) as ask:
        by_torch = json.loads(ask(json.dumps(job)))
        _agree("eager PyTorch", {task: np.array([value]) for task, value in by_torch.items()}, logits)
        runs = {
            "request": lambda: (prefill(), user.decode()),
            "unsplit_1": lambda: _run(whole, one),
            "unsplit_100": lambda: _run(whole, every),
            "eager_1": lambda: ask("forward"),
        }
        seconds = in_turn(runs, rounds=context.rounds(WHOLE_ROUNDS))
    notes = [f"a baseline's {CANDIDATES} forwards are one forward's median times {CANDIDATES}"]
    outcome = Outcome(samples=dict(seconds), notes=[*notes, f"all score alike within {AGREEMENT:g}"])
    reckoned = "floors of 100 forwards over those of a prefill and a decode"
    for name, text, count, predicted, reckoning in (
        ("eager_1", "eager PyTorch", CANDIDATES, prediction, f"{reckoned}; eager does more between them"),
        ("unsplit_1", "unsplit ONNX Runtime", CANDIDATES, prediction, reckoned),
        ("unsplit_100", "unsplit ONNX Runtime", 1, 1.0, "the same products"),
    ):
        each = f"for each of {CANDIDATES} candidates" if count > 1 else f"of all {CANDIDATES} candidates"
        told = {"scale": count, "prediction": predicted, "reckoning": reckoning}
        outcome.ratio(f"one {text} forward {each} over the whole request", seconds[name], seconds["request"], **told)
    outcome.milliseconds("whole request, prefill and decode", seconds["request"])
    outcome.milliseconds("one eager PyTorch forward of one candidate", seconds["eager_1"])
    outcome.milliseconds("one unsplit ONNX Runtime forward of one candidate", seconds["unsplit_1"])
    outcome.milliseconds(f"one unsplit ONNX Runtime forward of {CANDIDATES} candidates", seconds["unsplit_100"])
    return outcome


def _whole_session(context: Context) -> Any:
    path = context.path(f"{LARGE}-unsplit.onnx")
    if not path.exists():
        context.progress("lowering the unsplit forward")
        asked = {"preset": LARGE, "seed": SEED, "output": str(path)}
        context.module("benchmarks.contestants.unsplit", ["lower"], json.dumps(asked))
    return new_session(str(path), context.threads)


def _run(session: Any, inputs: Arrays) -> Arrays:
    wanted = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    values = session.run(names, {name: value for name, value in inputs.items() if name in wanted})
    return dict(zip(names, values, strict=True))


def _agree(name: str, found: Arrays, logits: Arrays) -> None:
    """No speed comes from a baseline that scores otherwise."""
    for task, expected in logits.items():
        error = np.abs(found[task] - expected[:, : found[task].shape[1]]).max() / np.abs(expected).max()
        if not error <= AGREEMENT:
            raise ParityError(f"{name} differs from the bundle by {error:.1e} in {task}; nothing is compared")
