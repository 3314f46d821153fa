"""Parity cases: inputs, and the scores that every target must come near; written into a bundle, read without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from onetrans.errors import BundleError
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.manifest import CASES_FILE
from onetrans.runtime.tensors import read_tensors

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class ParityCase:
    """One case.

    Attributes:
        name: What it tries, in words.
        prefill: User-scope inputs [U, …] of the prefill.
        append: User-scope inputs [U, …] of an append to the state that prefill left; empty where there is none.
        decode: Candidate-scope inputs [U, C, …], and user-scope ones that decode itself may read.
        reference: Logits per task in float64 [U, C]: one pass, no split, no cache.
        eager: The same forward in the bundle's dtype.
        tokens: S-tokens of each user's whole history [U], int64.
    """

    name: str
    prefill: Arrays
    append: Arrays = field(default_factory=dict)
    decode: Arrays
    reference: Arrays
    eager: Arrays
    tokens: NDArray[np.int64]

    @property
    def users(self) -> int:
        """U."""
        return len(self.tokens)

    @property
    def candidates(self) -> int:
        """C."""
        return int(next(iter(self.reference.values())).shape[1])


GROUPS = ("prefill", "append", "decode", "reference", "eager")
assert {*GROUPS, "name", "tokens"} == {field.name for field in fields(ParityCase)}


def write_cases(cases: Sequence[ParityCase], folder: Path) -> None:
    """Writes the cases into an unfinished bundle; their names go into the manifest."""
    tensors = {}
    for index, case in enumerate(cases):
        tensors[f"{index}/tokens/"] = case.tokens
        for group in GROUPS:
            for name, value in getattr(case, group).items():
                tensors[f"{index}/{group}/{name}"] = np.ascontiguousarray(value)
    save_file(tensors, folder / CASES_FILE)


def read_cases(bundle: Bundle) -> list[ParityCase]:
    """The cases that a bundle carries.

    Raises:
        BundleError: It carries none that can be read, or not those that its manifest states.
    """
    if CASES_FILE not in bundle.contents:
        raise BundleError(f"{bundle.path} carries no {CASES_FILE}; export it again")
    stored: dict[str, dict[str, Arrays]] = {}
    for key, value in read_tensors(bundle.contents[CASES_FILE], CASES_FILE).items():
        case, group, name = key.split("/", 2)
        stored.setdefault(case, {}).setdefault(group, {})[name] = value
    names: Sequence[str] = bundle.manifest.parity["case_names"]
    needed = {*GROUPS, "tokens"} - {"append"}
    complete = all(needed <= groups.keys() for groups in stored.values())
    if stored and (not complete or stored.keys() != {str(index) for index in range(len(names))}):
        raise BundleError(f"{CASES_FILE} of {bundle.path} does not hold the {len(names)} cases stated; export it again")
    return [
        ParityCase(
            name=names[int(index)],
            tokens=groups["tokens"][""],
            **{group: groups.get(group, {}) for group in GROUPS},
        )
        for index, groups in sorted(stored.items(), key=lambda item: int(item[0]))
    ]
