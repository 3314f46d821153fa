"""Verify: a bundle's scores against the reference that it carries, case by case, within the bound.

Needs no torch: the float64 reference was computed when the bundle was made, and is covered by its hashes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from onetrans.errors import ParityError
from onetrans.parity.bound import bound, eager_limit
from onetrans.parity.cases import Arrays, ParityCase
from onetrans.parity.comparison import CaseResult, compare, largest_error, largest_value
from onetrans.runtime.backends.base import Backend


def verify(
    backend: Backend, cases: Sequence[ParityCase], progress: Callable[[str], None] = lambda name: None
) -> list[CaseResult]:
    """Runs every case through prefill (or prefill and append) and decode, and compares.

    A case passes where its largest error is within `onetrans.parity.bound.bound`. The eager error there is taken over
    all cases, since that of a single logit is zero by luck now and then.

    Raises:
        ParityError: Nothing was compared, or reference and eager logits are not of one model.
    """
    if not cases:
        raise ParityError("nothing was compared: the bundle carries no parity case; export it again")
    dtype = backend.manifest.precision
    eager_error = max(largest_error(case.eager, case.reference) for case in cases)
    possible = eager_limit(max(largest_value(case.reference) for case in cases), dtype)
    if not eager_error <= possible:
        raise ParityError(
            f"the stored eager logits are {eager_error:.2e} from the reference where {possible:.2e} is possible: one"
            " of them was altered; export the bundle again"
        )
    results = []
    for case in cases:
        progress(case.name)
        logits = run_case(backend, case)
        results.append(compare(case, logits, bound(eager_error, largest_value(case.reference), dtype)))
    return results


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
            f" the reference where {worst.bound:.2e} is allowed"
        )


def run_case(backend: Backend, case: ParityCase) -> Arrays:
    """A case's logits per task [U, C], through slots of its own."""
    slots, pool = range(case.users), backend.allocate(case.users)
    backend.prefill(pool, slots, case.prefill)
    if case.append:
        backend.append(pool, slots, case.append)
    return {**backend.decode(pool, slots, case.decode, np.full(case.users, case.candidates))}
