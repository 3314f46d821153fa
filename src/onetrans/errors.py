"""The errors a user may see. Each is one clear line: what, which value, what is allowed, what to do.

The exit status of the command line is the `exit_status` of the error: 2 where what was given is wrong (arguments,
checkpoint, bundle, request), 1 where the job itself failed (parity, disk full).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OneTransError(Exception):
    """Base of every error that is meant for the user."""

    exit_status = 2


class ConfigError(OneTransError):
    """A model, schema or run configuration that cannot be."""


class DataError(OneTransError):
    """A request or log whose values are missing, of the wrong kind or out of bounds."""


class CheckpointError(OneTransError):
    """A checkpoint that is missing, truncated, foreign, or does not fit its configuration."""


class BundleError(OneTransError):
    """A bundle that is missing, changed, too new, or reaches outside its folder."""


class MissingDependencyError(OneTransError):
    """An optional package, driver or device that the asked-for work needs is absent."""


class OutputExistsError(OneTransError):
    """The output folder exists already."""


class JobError(OneTransError):
    """The work was asked for correctly and failed."""

    exit_status = 1


class StateError(JobError):
    """The state cache contradicts itself; a defect of this package."""


class ExportError(JobError):
    """A graph could not be captured, split or lowered."""


class ParityError(JobError):
    """A backend's results are too far from the reference, or nothing was compared."""


def unknown(kind: str, name: str, allowed: Iterable[str]) -> str:
    """The one wording for a name that is not known, as `unknown preset 'tini'; did you mean 'tiny'? allowed: tiny`."""
    listed = list(allowed)
    close = difflib.get_close_matches(name, listed, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else ";"
    return f"unknown {kind} {name!r}{meant} allowed: {', '.join(listed)}"
