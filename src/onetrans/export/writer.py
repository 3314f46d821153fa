"""Writes what a bundle says of itself: the manifest, with hashes of every file."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onetrans import __version__
from onetrans.export.config import ExportConfig
from onetrans.export.models.base import ModelAdapter
from onetrans.export.split import SplitReport
from onetrans.parity.cases import ParityCase
from onetrans.precision import precision
from onetrans.runtime import targets
from onetrans.runtime.manifest import MANIFEST_FILE, Graph, Manifest


def make_manifest(
    model: ModelAdapter,
    config: ExportConfig,
    graphs: Mapping[str, Graph],
    report: SplitReport,
    cases: Sequence[ParityCase],
    folder: Path,
) -> Manifest:
    """The manifest of the files in `folder`, without parity results."""
    target = targets.find(config.target)
    return Manifest(
        name=model.name,
        family=model.family,
        target=target.name,
        device=target.device,
        precision=precision(config.precision).name,
        model=model.config,
        description=model.description,
        weights_sha256=model.weights_sha256(),
        bounds=model.bounds(max_users=config.max_users, max_candidates=config.max_candidates),
        pyramid=model.pyramid,
        graphs=graphs,
        state=report.cut,
        tasks=model.tasks,
        split=dataclasses.asdict(report),
        parity={"case_names": [case.name for case in cases]},
        tools={"onetrans-export": __version__, **_versions(target)},
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        files=_hash_files(folder),
    )


def _versions(target: targets.Target) -> dict[str, str]:
    """Versions of what exporting to the target used, as far as it is installed as a distribution."""
    found = {}
    for package in (name for alternatives in target.export_packages for name in alternatives):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    hashed = {}
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST_FILE:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            hashed[path.name] = {"sha256": digest, "bytes": path.stat().st_size}
    return hashed


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Writes the manifest, over an earlier one of the unfinished folder."""
    (folder / MANIFEST_FILE).write_text(manifest.dumps(), encoding="utf-8")
