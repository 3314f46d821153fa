"""Opens a bundle: checks its schema version, hashes and paths, and hands out the very bytes that were hashed."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onetrans.errors import BundleError
from onetrans.runtime.manifest import MANIFEST_FILE, WEIGHTS_FILE, Manifest
from onetrans.runtime.targets import Trust, load, target_of

FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
MANIFEST_LIMIT = 64 << 20


@dataclass(frozen=True)
class Bundle:
    """A checked bundle.

    Attributes:
        path: The folder.
        manifest: Its contract.
        contents: Bytes of every file that the manifest lists, as hashed.
    """

    path: Path
    manifest: Manifest
    contents: Mapping[str, bytes]

    @classmethod
    def open(cls, path: str | Path, *, trust: Trust = "data") -> Bundle:
        """Reads and checks a bundle.

        Args:
            path: The folder.
            trust: `code` also opens bundles whose files are programs, which then may do anything that you may.

        Raises:
            BundleError: The folder, the manifest or a file is missing, changed, too new, or leaves the folder; or the
                bundle holds programs and is not trusted.
        """
        folder = Path(path)
        if not folder.is_dir():
            problem = "is not a folder" if folder.exists() else "does not exist"
            raise BundleError(f"bundle {folder} {problem}; give the folder that `onetrans export` wrote")
        text = _read(folder, MANIFEST_FILE, None)
        try:
            manifest = Manifest.loads(text.decode(), str(folder / MANIFEST_FILE))
        except UnicodeDecodeError as error:
            raise BundleError(f"{folder / MANIFEST_FILE} is not text ({error}); export the bundle again") from error
        target = target_of(folder, manifest.target)
        if target.trust == "code" and trust != "code":
            raise BundleError(
                f"bundle {folder} holds programs (target {target.name}), which can do anything on this machine; if you"
                ' trust where it came from, open it with trust="code"'
            )
        contents = {}
        for name, stated in manifest.files.items():
            if not FILE_NAME.fullmatch(name):
                raise BundleError(f"bundle {folder} lists {name!r}, which leaves its folder; do not trust this bundle")
            contents[name] = _read(folder, name, stated)
        for graph in manifest.graphs.values():
            if graph.file not in contents:
                raise BundleError(f"bundle {folder} does not list {graph.file}, which a graph needs")
            if graph.weights and WEIGHTS_FILE not in contents:
                raise BundleError(f"bundle {folder} does not list {WEIGHTS_FILE}, which {graph.file} needs")
            if target.file_check:
                load(target.file_check)(contents[graph.file], graph, folder / graph.file)
        return cls(folder, manifest, contents)


def _read(folder: Path, name: str, stated: Mapping[str, object] | None) -> bytes:
    path = folder / name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise BundleError(f"bundle {folder} lacks {name}; export it again or copy it whole") from None
    except OSError as error:
        if path.is_symlink():
            raise BundleError(f"{path} is a link; a bundle holds plain files only: copy the file itself") from None
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        os.close(descriptor)
        raise BundleError(f"{path} is a link or no plain file; a bundle holds plain files only: copy the file itself")
    with os.fdopen(descriptor, "rb") as file:
        limit = MANIFEST_LIMIT if stated is None else stated.get("bytes")
        if status.st_size > MANIFEST_LIMIT if stated is None else status.st_size != limit:
            raise BundleError(f"{path} has {status.st_size} bytes, expected {limit}; export the bundle again")
        content = file.read()
    if stated is not None and hashlib.sha256(content).hexdigest() != stated.get("sha256"):
        raise BundleError(f"{path} was changed since it was written (sha256 differs); export the bundle again")
    return content
