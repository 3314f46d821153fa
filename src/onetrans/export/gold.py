"""Gold: the reference forward in float64, one pass, no split, no cache, and the cases that every target must meet."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from onetrans.features.encode import encode_candidates, encode_tokens, encode_users
from onetrans.features.merge import Merge, TokenColumns, merge_tokens, parse_history
from onetrans.features.random_requests import random_request
from onetrans.features.windows import window_starts
from onetrans.model.config import ModelConfig
from onetrans.model.onetrans import OneTrans
from onetrans.parity.verify import StoredCase

Arrays = dict[str, NDArray[Any]]


def split_scopes(inputs: Mapping[str, NDArray[Any]]) -> tuple[Arrays, Arrays]:
    """User-scope and candidate-scope inputs."""
    user = {name: value for name, value in inputs.items() if not name.startswith("candidate_")}
    return user, {name: value for name, value in inputs.items() if name not in user}


def run_model(model: OneTrans, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """One pass of the model as it is, in its own dtype; logits per task."""
    dtype = model.norm.dtype

    def tensor(value: NDArray[Any]) -> torch.Tensor:
        found = torch.from_numpy(np.ascontiguousarray(value))
        return found.to(dtype) if found.is_floating_point() else found

    user, candidate = ({name: tensor(v) for name, v in part.items()} for part in split_scopes(inputs))
    with torch.inference_mode():
        return {task: logits.numpy() for task, logits in model(user, candidate).items()}


def build_cases(model: OneTrans, *, max_candidates: int, max_users: int, seed: int) -> list[StoredCase]:
    """Random requests over lengths 0, 1, short, full and beyond, several users, 1 to 500 candidates, and appends.

    Args:
        model: In the bundle's dtype; its float64 copy is the gold.
        max_candidates: Upper bound on C.
        max_users: Upper bound on U.
        seed: Of the requests.
    """
    config = model.config
    rng = np.random.default_rng(seed)
    chunk, full = config.append_chunk, config.max_history
    short = min(full, max(2, full // 10 + 1))
    beyond = full + 2 * chunk + chunk // 2
    many = min(500, max_candidates)
    plain: list[tuple[str, list[int], int]] = [
        ("empty history", [0], min(7, max_candidates)),
        ("one event", [1], min(7, max_candidates)),
        ("short history, one candidate", [short], 1),
        ("full history, one candidate", [full], 1),
        (f"full history, {min(100, max_candidates)} candidates", [full], min(100, max_candidates)),
        (f"longer than full, {many} candidates", [beyond], many),
        ("several users, mixed lengths", [0, full, 1, short, beyond][:max_users], min(63, max_candidates)),
    ]
    gold_model = copy.deepcopy(model).double()
    cases = []
    for name, lengths, candidates in plain:
        tokens, profile, candidate = _requests(config, lengths, candidates, rng)
        inputs = {**_window(config, tokens, lengths), **profile, **candidate}
        cases.append(_case(name, inputs, {}, model, gold_model))
    if config.merge == "time" and chunk > 1:
        for old, new in ((chunk, 2 * chunk - 1), (beyond // chunk * chunk, beyond // chunk * chunk + chunk // 2)):
            tokens, profile, candidate = _requests(config, [new], min(63, max_candidates), rng)
            before = {**_window(config, tokens, [old]), **profile}
            inputs = {**_window(config, tokens, [new]), **profile, **candidate}
            cases.append(_case(f"append {new - old} events to {old}", inputs, before, model, gold_model))
    return cases


def _requests(
    config: ModelConfig, lengths: Sequence[int], candidates: int, rng: np.random.Generator
) -> tuple[list[TokenColumns], Arrays, Arrays]:
    schema = config.schema
    requests = [random_request(schema, events=n, candidates=candidates, rng=rng) for n in lengths]
    merge = cast(Merge, config.merge)
    tokens = [merge_tokens(schema, parse_history(schema, request.history), merge) for request in requests]
    profile = encode_users(schema, [request.profile for request in requests])
    return tokens, profile, encode_candidates(schema, [request.candidates for request in requests])[0]


def _window(config: ModelConfig, tokens: Sequence[TokenColumns], lengths: Sequence[int]) -> Arrays:
    """History inputs of the first `lengths` tokens (all of them where separators were merged in)."""
    known = [
        {name: column[:n] for name, column in t.items()} if config.merge == "time" else t
        for t, n in zip(tokens, lengths, strict=True)
    ]
    keep, c = config.keep, config.append_chunk
    starts = [window_starts(len(t["behaviour"]), max_history=config.max_history, keep=keep, chunk=c)[0] for t in known]
    return encode_tokens(config.schema, known, starts)


def _case(name: str, inputs: Arrays, before: Arrays, model: OneTrans, gold_model: OneTrans) -> StoredCase:
    gold, reference = run_model(gold_model, inputs), run_model(model, inputs)
    return StoredCase(name=name, inputs=inputs, before=before, gold=gold, reference=reference)
