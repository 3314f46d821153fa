"""request_vs_unsplit: prefill and decode of 100 candidates against one whole forward per candidate."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks.context import SEED, Context
from benchmarks.matmul import CANDIDATES, Prepared, prepare
from benchmarks.measure import Measured, estimated, in_turn
from benchmarks.products import decode_products, prefill_products
from benchmarks.reckoning import floor_seconds
from onetrans.bench.stats import median, median_ratio
from onetrans.errors import ParityError

ROUNDS = 20
TARGET = 200.0
AGREEMENT = 1e-4  # of logits, relative to the largest; a baseline that scores otherwise would be another model

NAMES = {
    "request": "whole request, prefill and decode",
    "eager_1": "one eager PyTorch forward of one candidate",
    "unsplit_1": "one unsplit ONNX Runtime forward of one candidate",
    "unsplit_100": f"one unsplit ONNX Runtime forward of {CANDIDATES} candidates",
}

Arrays = dict[str, NDArray[Any]]


def request_vs_unsplit(context: Context) -> Measured:
    """The whole request against both baselines, and against one unsplit forward that takes all candidates at once."""
    p = prepare(context, context.large)
    prediction = _predict(p, context)
    context.progress(f"predicted: ratio {prediction:.0f} to one forward per candidate, target {TARGET:.0f}")
    one = {name: value[:, :1] for name, value in p.candidate.items()}
    whole = _whole_session(context)
    p.prefill()
    logits = p.decode()
    _agree("ONNX Runtime, unsplit", _run(whole, {**p.user, **p.candidate}), logits)
    with context.server("benchmarks.unsplit", ["eager"]) as ask:
        by_torch = json.loads(ask(json.dumps(_eager_job(context, {**p.user, **one}))))
        _agree("eager PyTorch", {task: np.array([value]) for task, value in by_torch.items()}, logits)
        runs = {
            "request": p.request,
            "unsplit_1": lambda: _run(whole, {**p.user, **one}),
            "unsplit_100": lambda: _run(whole, {**p.user, **p.candidate}),
            "eager_1": lambda: ask("forward"),
        }
        seconds = in_turn(runs, rounds=context.rounds(ROUNDS))
    medians = {name: median(values) for name, values in seconds.items()}
    rows = [
        estimated(
            median_ratio(seconds["eager_1"], seconds["request"]),
            scale=CANDIDATES,
            what=f"one eager PyTorch forward for each of {CANDIDATES} candidates over the whole request",
            unit="",
            target=TARGET,
            at_least=True,
            prediction=prediction,
            reckoning="floors of 100 forwards over those of a prefill and a decode; eager does more between them",
        ),
        estimated(
            median_ratio(seconds["unsplit_1"], seconds["request"]),
            scale=CANDIDATES,
            what=f"one unsplit ONNX Runtime forward for each of {CANDIDATES} candidates over the whole request",
            unit="",
            prediction=prediction,
            reckoning="likewise",
        ),
        estimated(
            median_ratio(seconds["unsplit_100"], seconds["request"]),
            what=f"one unsplit ONNX Runtime forward of all {CANDIDATES} candidates over the whole request",
            unit="",
            prediction=1.0,
            reckoning="the same products",
        ),
        *(estimated(medians[name], scale=1e3, what=f"{text}, median", unit="ms") for name, text in NAMES.items()),
    ]
    notes = [
        f"a baseline's {CANDIDATES} forwards are one forward's median times {CANDIDATES}",
        f"all score alike within {AGREEMENT:g}",
    ]
    return Measured(rows=rows, samples=seconds, notes=notes)


def _predict(p: Prepared, context: Context) -> float:
    def seconds(candidates: int) -> float:
        user = prefill_products(p.config, lengths=p.lengths, visible_only=False)
        decode = decode_products(p.config, lengths=p.lengths, candidates=candidates)
        return floor_seconds([*user, *decode], context.machine)

    return CANDIDATES * seconds(1) / seconds(CANDIDATES)


def _whole_session(context: Context) -> Any:
    path = context.place(f"{context.large}-unsplit.onnx")
    if not path.exists():
        context.progress("lowering the unsplit forward")
        asked = {"preset": context.large, "seed": SEED, "output": str(path)}
        context.module("benchmarks.unsplit", ["lower"], json.dumps(asked))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = context.threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # as the backend does
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run(session: Any, inputs: Arrays) -> Arrays:
    wanted = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    values = session.run(names, {name: value for name, value in inputs.items() if name in wanted})
    return dict(zip(names, values, strict=True))


def _eager_job(context: Context, inputs: Arrays) -> dict[str, Any]:
    path = context.place(f"{context.large}-one.npz")
    np.savez(path, **inputs)  # type: ignore[arg-type]
    return {"preset": context.large, "seed": SEED, "inputs": str(path), "threads": context.threads}


def _agree(what: str, found: Arrays, logits: Arrays) -> None:
    """No speed comes from a baseline that scores otherwise.

    Raises:
        ParityError: It does.
    """
    for task, expected in logits.items():
        expected = expected[:, : found[task].shape[1]]
        error = np.abs(found[task] - expected).max() / np.abs(logits[task]).max()
        if not error <= AGREEMENT:
            raise ParityError(f"{what} differs from the bundle by {error:.1e} in {task}; nothing is compared")
