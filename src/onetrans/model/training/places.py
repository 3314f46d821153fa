"""Where a run writes: its output, and beside it what an unfinished run keeps. No torch, so that refusals are quick."""

from __future__ import annotations

from pathlib import Path

from onetrans.errors import OutputExistsError


def state_folder(output: Path) -> Path:
    """Where the checkpoints of an unfinished run into `output` lie: beside it, hidden."""
    return output.parent / f".{output.name}.training"


def has_state(folder: Path) -> bool:
    """Whether a run can be resumed from a state folder."""
    return folder.is_dir() and any(folder.glob("step-*"))


def check_output(output: Path, *, resume: bool) -> None:
    """Refuses to train into what is there already.

    Raises:
        OutputExistsError: `output` exists, or an unfinished run into it does and is not to be resumed.
    """
    if output.exists() or output.is_symlink():
        done = f"the run into {output} is finished" if resume else f"{output} exists already"
        raise OutputExistsError(f"{done}; name another output or remove it")
    folder = state_folder(output)
    if not resume and has_state(folder):
        raise OutputExistsError(
            f"an unfinished run into {output} lies in {folder}; continue it with --resume, or remove that folder"
        )
