"""One version of the model, and a request as it ranks it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from onetrans.errors import DataError
from onetrans.features.encoder import ParsedRequest, RequestEncoder
from onetrans.features.requests import Request
from onetrans.runtime.backends.base import Backend
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.cache.fingerprint import RunningHash, context_digest
from onetrans.runtime.cache.lookup import Policy
from onetrans.runtime.cache.state_cache import Key


@dataclass(frozen=True, kw_only=True, eq=False)
class UserRequest:
    """A checked request, and by what its user's state is found.

    Attributes:
        parsed: Its columns.
        key: Names the user's state; None where none is kept.
        history: Running hash of the tokens.
        context: Hash of the profile inputs.
    """

    parsed: ParsedRequest
    key: Key | None
    history: RunningHash
    context: bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelVersion:
    """A bundle with its backend, and how requests become its inputs."""

    bundle: Bundle
    backend: Backend
    policy: Policy

    @cached_property
    def name(self) -> str:
        """Hash of the manifest: a state fits the version that made it."""
        return hashlib.sha256(self.bundle.manifest.dumps().encode()).hexdigest()[:16]

    @cached_property
    def encoder(self) -> RequestEncoder:
        """Makes the model's inputs."""
        manifest = self.bundle.manifest
        return RequestEncoder(schema=manifest.schema, merge=manifest.merge, pyramid=manifest.pyramid)

    def parse(self, request: Request, label: str, *, keep: bool) -> UserRequest:
        """Checks a request.

        Args:
            request: As a caller states it.
            label: Stands first in errors, unless the request has a label of its own.
            keep: Whether states of named users are kept.

        Raises:
            DataError: A value is missing, of the wrong kind or out of bounds.
        """
        parsed = self.encoder.parse(request, label)
        most = self.bundle.manifest.bounds["C"][1]
        if parsed.count > most:
            label = request.label or label
            raise DataError(
                f"{label}{': ' if label else ''}{parsed.count} candidates were given; this bundle takes 1 to {most}:"
                " score them in parts"
            )
        return UserRequest(
            parsed=parsed,
            key=(self.name, request.user) if keep and request.user else None,
            history=RunningHash(parsed.tokens),
            context=context_digest(parsed.profile),
        )
