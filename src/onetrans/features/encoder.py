"""The way of a request into a model, once and in one direction.

A request has three forms. A `Request` is what a caller states: rows, columns, or JSON. `RequestEncoder.parse` checks
it against the schema and merges its tokens: a `ParsedRequest`, columns of one user. `RequestEncoder.inputs` puts the
columns of several users together: the model's inputs, [U, …] and [U, C, …].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onetrans.features.columns import Columns
from onetrans.features.encode import batch_candidates, encode_tokens, encode_users, parse_candidates
from onetrans.features.merge import Merge, TokenColumns, merge_tokens, parse_history
from onetrans.features.requests import Request
from onetrans.features.schema import FeatureSchema
from onetrans.features.windows import Pyramid


@dataclass(frozen=True, kw_only=True, eq=False)
class ParsedRequest:
    """One user's checked columns.

    Attributes:
        tokens: The whole history, merged: a column [tokens, …] per event feature.
        profile: User inputs [1, …].
        candidates: A column [C, …] per candidate feature.
    """

    tokens: TokenColumns
    profile: Columns
    candidates: Columns

    @property
    def length(self) -> int:
        """S-tokens of the whole history."""
        return len(self.tokens["behaviour"])

    @property
    def count(self) -> int:
        """Candidates."""
        return len(next(iter(self.candidates.values())))


@dataclass(frozen=True, kw_only=True)
class RequestEncoder:
    """Turns requests into the inputs of one model.

    Attributes:
        schema: Declares the features.
        merge: How behaviours become one sequence.
        pyramid: Says where a prefill begins.
    """

    schema: FeatureSchema
    merge: Merge
    pyramid: Pyramid

    def parse(self, request: Request, label: str = "") -> ParsedRequest:
        """Checks a request's values.

        Args:
            request: As a caller states it.
            label: Stands first in errors, as `request 3`; that of the request if left out.

        Raises:
            DataError: A value is missing, of the wrong kind or out of bounds.
        """
        label = request.label or label
        before = f"{label}: " if label else ""
        history = parse_history(self.schema, request.history, where=f"{before}history")
        return ParsedRequest(
            tokens=merge_tokens(self.schema, history, self.merge),
            profile=encode_users(self.schema, [request.profile], where=f"{before}profile"),
            candidates=parse_candidates(self.schema, request.candidates, where=f"{before}candidates"),
        )

    def start(self, parsed: ParsedRequest) -> int:
        """First token that a prefill sees."""
        return self.pyramid.starts(parsed.length)[0]

    def user_inputs(self, parsed: Sequence[ParsedRequest], starts: Sequence[int] | None = None) -> Columns:
        """Inputs of scope user [U, …].

        Args:
            parsed: One per user.
            starts: Per user, the first token to give; where a prefill begins if left out.
        """
        if starts is None:
            starts = [self.start(one) for one in parsed]
        return encode_tokens(self.schema, [one.tokens for one in parsed], starts) | self.profiles(parsed)

    def profiles(self, parsed: Sequence[ParsedRequest]) -> Columns:
        """Profile inputs [U, …], which decode may read as well."""
        names = parsed[0].profile
        return {name: np.concatenate([one.profile[name] for one in parsed]) for name in names}

    def candidate_inputs(self, parsed: Sequence[ParsedRequest]) -> tuple[Columns, NDArray[np.int64]]:
        """Inputs of scope candidate [U, C, …], and the candidates of each user [U]."""
        return batch_candidates([one.candidates for one in parsed])

    def inputs(self, parsed: Sequence[ParsedRequest], starts: Sequence[int] | None = None) -> Columns:
        """All inputs of the model's forward; see `user_inputs`."""
        return self.user_inputs(parsed, starts) | self.candidate_inputs(parsed)[0]
