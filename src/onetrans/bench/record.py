"""Records: what was measured, of which bundle, where and how, with the raw samples; plain JSON, written atomically."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from onetrans.bench.environment import environment
from onetrans.bench.run import GARBAGE_COLLECTOR, Samples
from onetrans.bench.stats import percentiles
from onetrans.errors import DataError
from onetrans.files import replace_text
from onetrans.runtime.manifest import Manifest

FORMAT = "onetrans-bench"
VERSION = 1
NEEDED = ("environment", "bundle", "load", "samples", "summary")

Record = dict[str, Any]


def make_record(
    manifest: Manifest,
    samples: Samples,
    *,
    load: Mapping[str, Any],
    threads: int | None,
    parity: Mapping[str, Any],
    notes: tuple[str, ...] = (),
) -> Record:
    """One latency measurement as plain data.

    Args:
        manifest: The bundle's manifest.
        samples: Raw seconds.
        load: What was asked of it.
        threads: Threads of the backend; None is the backend's choice.
        parity: How far the bundle was from the reference when it was measured.
        notes: What a reader must know.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "environment": environment(),
        "command": command(),
        "bundle": {
            "name": manifest.name,
            "target": manifest.target,
            "device": manifest.device,
            "precision": manifest.precision,
            "weights_sha256": manifest.weights_sha256,
            "config_sha256": config_hash(manifest.model),
        },
        "parity": dict(parity),
        "load": dict(load),
        "threads": threads,
        "warmup": samples.warmup,
        "clock": "time.perf_counter",
        "garbage_collector": GARBAGE_COLLECTOR,
        "notes": list(notes),
        "summary": summarise(samples.seconds),
        "samples": samples.seconds,
    }


def summarise(seconds: Mapping[str, list[float]]) -> dict[str, dict[str, dict[str, float]]]:
    """Component to `p50`, `p95`, `p99`, each {value, low, high} in seconds."""
    return {name: {p: asdict(e) for p, e in percentiles(values).items()} for name, values in seconds.items()}


def config_hash(model: Mapping[str, Any]) -> str:
    """SHA-256 of a model's configuration in canonical JSON."""
    return hashlib.sha256(json.dumps(model, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def files_hash(root: Path, paths: Iterable[Path]) -> str:
    """SHA-256 over names and contents of files below a folder."""
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(f"{path.relative_to(root).as_posix()}\0".encode())
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def command() -> list[str]:
    """The running command line, the program by its name alone."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON in place of what was there; a crash leaves the old file or the new one.

    Raises:
        JobError: The disk refused.
    """
    replace_text(path, dumps(value))


def read_record(
    path: str | Path, *, form: str = FORMAT, version: int = VERSION, needed: tuple[str, ...] = NEEDED
) -> Record:
    """Reads a record.

    Raises:
        DataError: It is missing, no record of that format, of another version or incomplete.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; give a record that a benchmark wrote") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != form:
        raise DataError(f"{path} is no record of format {form!r}; give one that a benchmark wrote")
    if record.get("version") != version:
        raise DataError(f"{path} has version {record.get('version')!r}; this release reads {version}")
    for key in needed:
        if key not in record:
            raise DataError(f"{path} lacks {key!r}; measure again")
    return record


def dumps(value: Any) -> str:
    """JSON text, indented, with each list or estimate on one line."""
    return _dump(value, "") + "\n"


def _dump(value: Any, indent: str) -> str:
    inner = indent + "  "
    if isinstance(value, Mapping) and set(value) != {"value", "low", "high"} and value:
        rows = [f"{inner}{json.dumps(str(key))}: {_dump(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and any(isinstance(item, dict | list | tuple) for item in value):
        return "[\n" + ",\n".join(inner + _dump(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
