"""Output that is there whole or not at all: written beside its place, then renamed."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onetrans.errors import JobError, OutputExistsError


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Gives an unfinished folder to fill; it becomes `path` when the block ends, and vanishes when the block fails.

    Raises:
        OutputExistsError: `path` exists.
        JobError: The disk refused.
    """
    path, unfinished = _places(path)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.rename(path)
    except OSError as error:
        raise JobError(f"{path} could not be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_new_text(path: str | Path, text: str) -> None:
    """Writes a text file that is not there yet.

    Raises:
        OutputExistsError: `path` exists.
        JobError: The disk refused.
    """
    path, unfinished = _places(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        unfinished.rename(path)
    except OSError as error:
        raise JobError(f"{path} could not be written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _places(path: str | Path) -> tuple[Path, Path]:
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise OutputExistsError(f"{path} exists already; name another path or remove it")
    return path, path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.unfinished"
