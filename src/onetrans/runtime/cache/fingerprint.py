"""Fingerprints of what a state was computed from: a running hash of the tokens, and one of profile and context."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES = 16


class RunningHash:
    """Hash of a user's tokens, from the first one on, at any count of them.

    It covers all that a token is made of (behaviour and event features), so equal hashes mean equal states. It is
    computed from the tokens of the request at hand; nothing is taken from the caller's word.
    """

    def __init__(self, tokens: Mapping[str, NDArray[Any]]) -> None:
        """Packs the tokens of `onetrans.features.merge.merge_tokens`, one row of bytes each."""
        columns = [np.ascontiguousarray(tokens[name]) for name in sorted(tokens)]
        self.tokens = len(tokens["behaviour"])
        packed = [
            column.view(np.uint8).reshape(self.tokens, column.nbytes // self.tokens)
            for column in columns
            if self.tokens
        ]
        self._rows = np.concatenate(packed, axis=1) if packed else np.zeros((0, 0), np.uint8)

    def digests(self, count: int) -> tuple[bytes, bytes]:
        """Hashes the first `count` tokens, and all of them."""
        running = hashlib.blake2b(self._rows[:count].tobytes(), digest_size=DIGEST_BYTES)
        first = running.digest()
        running.update(self._rows[count:].tobytes())
        return first, running.digest()


def context_digest(inputs: Mapping[str, NDArray[Any]]) -> bytes:
    """Hashes the user-scope inputs that are no events: profile and request context, with their shapes."""
    running = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name in sorted(inputs):
        value = np.ascontiguousarray(inputs[name])
        running.update(f"{name} {value.dtype} {value.shape}\n".encode())
        running.update(value.tobytes())
    return running.digest()
