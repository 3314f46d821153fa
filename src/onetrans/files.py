"""Output that is there whole or not at all: written beside its path, flushed to the disk, then renamed.

A process that is killed leaves `.NAME.PID.HEX.unfinished` behind; the next writer of the same path removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from onetrans.errors import JobError, OutputExistsError

STARTED = time.time()  # what this process wrote is younger
FILE_MODE = 0o644  # less the umask; safetensors alone would give 0600


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Gives an unfinished folder to fill; it becomes `path` when the block ends, and vanishes when the block fails.

    Raises:
        OutputExistsError: `path` exists.
        JobError: The disk refused.
    """
    path = Path(path)
    with _unfinished(path, Path.mkdir) as draft:
        yield draft
        mode = FILE_MODE & draft.stat().st_mode  # a new folder has every bit that the umask leaves
        for folder, _, names in os.walk(draft):
            for name in names:
                _flush(Path(folder, name), mode)
            _flush(Path(folder))
        _rename(draft, path)


def write_new_text(path: str | Path, text: str) -> None:
    """Writes a text file that is not there yet.

    Raises:
        OutputExistsError: `path` exists.
        JobError: The disk refused.
    """
    path = Path(path)
    with _unfinished(path, _touch) as draft:
        draft.write_text(text, encoding="utf-8")
        _flush(draft)
        _rename(draft, path)


def replace_text(path: str | Path, text: str) -> None:
    """Writes a text file, in place of the one that may be there; a crash leaves the old one or the new one.

    Raises:
        JobError: The disk refused.
    """
    path = Path(path)
    with _unfinished(path, _touch, replace=True) as draft:
        draft.write_text(text, encoding="utf-8")
        _flush(draft)
        draft.replace(path)
        _flush(path.parent)


def _touch(draft: Path) -> None:
    draft.touch(FILE_MODE)


@contextmanager
def _unfinished(path: Path, make: Callable[[Path], None], *, replace: bool = False) -> Iterator[Path]:
    """Makes something beside `path`, in a folder made where it must be; where the block fails, all of it vanishes."""
    draft = path.parent / f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.unfinished"
    made: list[Path] = []
    try:
        if not replace:
            _refuse_existing(path)
        made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead(path)
        make(draft)
        with _locked(draft):
            yield draft
    except (OSError, SafetensorError) as error:  # safetensors wraps what the disk refused it
        _remove(draft, made)
        raise JobError(f"{path} could not be written: {error}") from error
    except BaseException:
        _remove(draft, made)
        raise


def _remove(draft: Path, folders: list[Path]) -> None:
    """Removes what it can; where the disk refuses, the error that led here is the one to report."""
    with suppress(OSError):
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)
    for folder in folders:
        with suppress(OSError):  # never made, or another process fills it
            folder.rmdir()


def _refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise OutputExistsError(f"{path} exists already; name another path or remove it")


def _rename(draft: Path, path: Path) -> None:
    _refuse_existing(path)  # a rename would replace a file or an empty folder that came meanwhile
    try:
        draft.rename(path)
    except OSError:
        _refuse_existing(path)
        raise
    _flush(path.parent)


def _flush(path: Path, mode: int | None = None) -> None:
    """Sees a file's or folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if mode is not None:
            os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot flush a folder
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _locked(draft: Path) -> Iterator[None]:
    """Holds a lock that ends with this process, by which others know that it lives, in whatever container."""
    descriptor = os.open(draft, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks leaves the process id
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_dead(path: Path) -> None:
    """Removes what killed writers of `path` left."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.[0-9a-f]{{8}}\.unfinished")
    for entry in list(path.parent.iterdir()):
        match = pattern.fullmatch(entry.name)
        if match and _is_dead(entry, int(match[1])):
            _remove(entry, [])


def _is_dead(draft: Path, pid: int) -> bool:
    """Whether the writer's process is gone and nobody holds its lock."""
    try:
        if pid == os.getpid():
            # Another thread's; or, in a restarted container, that of a killed writer which had our process id.
            if draft.lstat().st_mtime >= STARTED:
                return False
        elif _is_alive(pid):
            return False
        descriptor = os.open(draft, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here
        return True
    finally:
        os.close(descriptor)
    return True


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True
