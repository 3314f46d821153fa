"""Verify: a bundle's scores against the gold it carries, within a formula, and what users feel of the difference.

Needs no torch: the float64 gold was computed when the bundle was made, and is covered by its hashes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onetrans.errors import BundleError, ParityError
from onetrans.runtime.backends.base import Backend
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.manifest import GOLD_FILE
from onetrans.runtime.tensors import read_tensors

Arrays = dict[str, NDArray[Any]]

FACTOR = 1.5
FLOOR_ULP = 4
REFERENCE_ULP = 1024  # some thousand roundings of a deep model, were they all to add up
TOP_K = 10
ULP = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


@dataclass(frozen=True, kw_only=True)
class StoredCase:
    """One parity case of a bundle; `before` is empty unless the case is an append."""

    name: str
    inputs: Arrays
    before: Arrays
    gold: Arrays
    reference: Arrays


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """How far one case is from gold.

    Attributes:
        name: Of the case.
        users: U.
        lengths: S-tokens of each user.
        candidates: C.
        error: Largest absolute error of a logit.
        reference_error: The same of plain PyTorch in the bundle's dtype.
        bound: What `error` may be.
        relative_error: Euclidean norm of the error over that of gold, all tasks together.
        top_k: Share of gold's best k candidates (k = 10 or all) among the bundle's, mean over users; first task.
        rank_correlation: Spearman's, mean over users; first task. 1 for a single candidate.
        passed: error <= bound.
    """

    name: str
    users: int
    lengths: tuple[int, ...]
    candidates: int
    error: float
    reference_error: float
    bound: float
    relative_error: float
    top_k: float
    rank_correlation: float
    passed: bool


def read_cases(bundle: Bundle) -> list[StoredCase]:
    """The cases that a bundle carries.

    Raises:
        BundleError: It carries none that can be read.
    """
    if GOLD_FILE not in bundle.contents:
        raise BundleError(f"{bundle.path} carries no {GOLD_FILE}; export it again")
    parts: dict[str, dict[str, Arrays]] = {}
    for key, value in read_tensors(bundle.contents[GOLD_FILE], GOLD_FILE).items():
        case, kind, name = key.split("/")
        parts.setdefault(case, {}).setdefault(kind, {})[name] = value
    names: Sequence[str] = bundle.manifest.parity["case_names"]
    complete = all({"inputs", "gold", "reference"} <= kinds.keys() for kinds in parts.values())
    if parts and (not complete or parts.keys() != {str(index) for index in range(len(names))}):
        raise BundleError(f"{GOLD_FILE} of {bundle.path} does not hold the {len(names)} cases stated; export it again")
    return [
        StoredCase(
            name=names[int(case)],
            inputs=kinds["inputs"],
            before=kinds.get("before", {}),
            gold=kinds["gold"],
            reference=kinds["reference"],
        )
        for case, kinds in sorted(parts.items(), key=lambda item: int(item[0]))
    ]


def verify(
    bundle: Bundle,
    backend: Backend,
    cases: Sequence[StoredCase],
    progress: Callable[[str], None] = lambda name: None,
) -> list[CaseResult]:
    """Runs every case through prefill (or prefill and append) and decode, and compares.

    A case passes where its largest error is at most FACTOR times the reference's largest error plus FLOOR_ULP units in
    the last place of its largest logit. The reference's error is taken over all cases, since that of a single logit is
    zero by luck now and then. A reference further than REFERENCE_ULP units from gold is no reference.

    Raises:
        ParityError: Nothing was compared, or gold and reference are not of one model.
    """
    if not cases:
        raise ParityError("nothing was compared: the bundle carries no parity case; export it again")
    reference_error = max(_largest(case.reference, case.gold) for case in cases)
    ulp = ULP[bundle.manifest.precision]
    _check_reference(cases, reference_error, ulp)
    results = []
    for case in cases:
        progress(case.name)
        logits = _run(backend, case)
        largest = max(float(np.abs(gold).max()) for gold in case.gold.values())
        bound = FACTOR * reference_error + FLOOR_ULP * ulp * largest
        error = _largest(logits, case.gold)
        gold = np.concatenate([value.ravel() for value in case.gold.values()])
        found = np.concatenate([logits[task].ravel() for task in case.gold])
        first = next(iter(case.gold))
        results.append(
            CaseResult(
                name=case.name,
                users=len(case.inputs["history_length"]),
                lengths=tuple(int(n) for n in case.inputs["history_start"] + case.inputs["history_length"]),
                candidates=case.gold[first].shape[1],
                error=error,
                reference_error=_largest(case.reference, case.gold),
                bound=bound,
                relative_error=float(np.linalg.norm(found - gold) / np.linalg.norm(gold)),
                top_k=_top_k(logits[first], case.gold[first]),
                rank_correlation=_rank_correlation(logits[first], case.gold[first]),
                passed=bool(error <= bound),  # False for NaN
            )
        )
    return results


def _check_reference(cases: Sequence[StoredCase], reference_error: float, ulp: float) -> None:
    largest = max(float(np.abs(gold).max()) for case in cases for gold in case.gold.values())
    allowed = REFERENCE_ULP * ulp * largest
    if not reference_error <= allowed:
        raise ParityError(
            f"the stored reference is {reference_error:.2e} from gold where {allowed:.2e} is possible: one of them was"
            " altered; export the bundle again"
        )


def check(results: Sequence[CaseResult]) -> None:
    """Raises where a case failed.

    Raises:
        ParityError: A case is beyond its bound.
    """
    failed = [result for result in results if not result.passed]
    if failed:
        worst = max(failed, key=lambda r: r.error / r.bound if r.error == r.error else float("inf"))
        raise ParityError(
            f"{len(failed)} of {len(results)} parity cases failed; the worst, {worst.name!r}, is {worst.error:.2e} from"
            f" gold where {worst.bound:.2e} is allowed"
        )


def _run(backend: Backend, case: StoredCase) -> Arrays:
    candidate = {name: value for name, value in case.inputs.items() if name.startswith("candidate_")}
    user = {name: value for name, value in case.inputs.items() if name not in candidate}
    U, C = next(iter(candidate.values())).shape[:2]
    slots, pool = range(U), backend.allocate(U)
    backend.prefill(pool, slots, case.before or user)
    if case.before:
        held = case.before["history_start"] + case.before["history_length"]
        offset = int((held - case.inputs["history_start"])[0])
        new = {name: value[:, offset:] if name.startswith("event_") else value for name, value in user.items()}
        new |= {"history_start": held, "history_length": case.inputs["history_length"] - offset}
        backend.append(pool, slots, new)
    return backend.decode(pool, slots, {**user, **candidate}, np.full(U, C))


def _largest(logits: Mapping[str, NDArray[Any]], gold: Mapping[str, NDArray[Any]]) -> float:
    return float(np.max([np.abs(logits[task] - value).max() for task, value in gold.items()]))


def _top_k(found: NDArray[Any], gold: NDArray[Any]) -> float:
    k = min(TOP_K, gold.shape[1])
    best = [np.intersect1d(np.argsort(-f)[:k], np.argsort(-g)[:k]).size / k for f, g in zip(found, gold, strict=True)]
    return float(np.mean(best))


def _rank_correlation(found: NDArray[Any], gold: NDArray[Any]) -> float:
    if gold.shape[1] < 2:
        return 1.0
    ranks = [np.argsort(np.argsort(x, axis=1), axis=1).astype(np.float64) for x in (found, gold)]
    centred = [r - r.mean(axis=1, keepdims=True) for r in ranks]
    products = (centred[0] * centred[1]).sum(axis=1)
    norms = np.sqrt((centred[0] ** 2).sum(axis=1) * (centred[1] ** 2).sum(axis=1))
    return float(np.mean(products / norms))
