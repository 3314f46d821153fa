"""Whatever goes wrong: one clear line on stderr, the right exit status, no traceback, nothing half-written."""

from __future__ import annotations

import errno
import functools
import json
import os
import pickle
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from onetrans.errors import JobError
from onetrans.files import replace_text, write_new_text
from onetrans.model.presets import preset
from parity_tests.conftest import MAIN, Command, as_rows, error_line, listing, request_of


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["bogus"], "No such command 'bogus'."),
        (["export"], "Missing option '--output'."),
        (["export", "--bogus"], "No such option"),
        (["verify"], "Missing argument 'BUNDLE'."),
        (["export", "--output", "b", "--max-candidates", "many"], "'many' is not a valid integer"),
        (["export", "--output", "b", "--seed", "-1"], "--seed is -1; it must be at least 0"),
        (["export", "--output", "b"], "give either --checkpoint FOLDER, or --preset NAME with --random-weights"),
        (["export", "--output", "b", "--preset", "tiny"], "give either --checkpoint FOLDER, or --preset NAME with"),
        (["export", "--output", "b", "--random-weights"], "give either --checkpoint FOLDER, or --preset NAME with"),
        (["export", "--output", "b", "--target", "abacus"], "'--target': 'abacus' is not one of 'onnx'"),
        (
            ["export", "--output", "b", "--precision", "fp8"],
            "'--precision': 'fp8' is not one of 'fp32', 'fp16'",
        ),
        (["export", "--output", "b", "--precision", "bf16"], "cannot run precision 'bf16'; allowed: fp32"),
        (["export", "--output", "b", "--max-candidates", "0"], "--max-candidates is 0; it must be at least 2"),
        (["export", "--output", "b", "--max-users", "-3"], "--max-users is -3; it must be at least 2"),
        (
            ["export", "--output", "b", "--preset", "huge", "--random-weights"],
            "'--preset': 'huge' is not one of 'tiny', 'onetrans-s', 'onetrans-l'",
        ),
        (["verify", "none"], "bundle none does not exist"),
        (["verify", "none", "--threads", "0"], "--threads is 0; it must be at least 1"),
        (["inspect", "none"], "bundle none does not exist"),
        (["score", "none", "--input", "x"], "bundle none does not exist"),
        (["score", "none", "--input", "x", "--top", "0"], "--top is 0; it must be at least 1"),
        (["score", "none", "--input", "x", "--limit", "0"], "--limit is 0; it must be at least 1"),
        (["bench", "none"], "bundle none does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_mistakes(
    run_here: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in error_line(run_here(*args), 2)
    assert listing(tmp_path) == {}


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def widen(folder: Path) -> None:
    record = json.loads((folder / "config.json").read_text())
    record["config"]["event_hidden"] = 96
    (folder / "config.json").write_text(json.dumps(record))


def lose(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["heads.ctr.up.weight"]
    save_file(weights, folder / "model.safetensors")


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def disguised(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps({"w": [1.0]}))


def spoil(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["heads.ctr.up.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors")


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "does not exist; give a folder that `onetrans train` wrote"),
    "truncated": (truncate, "model.safetensors is truncated or corrupt"),
    "foreign": (lambda folder: (folder / "config.json").write_text('{"d": 1}'), "its format is absent; expected"),
    "config-disagrees": (widen, "tensor events.mlps.0.up.weight has shape [64, 49], but the config expects [96, 49]"),
    "tensor-missing": (lose, "lacks the tensor heads.ctr.up.weight of shape [32, 64] that its config needs"),
    "pickle": (pickled, "pytorch_model.bin is a pickle, which could run any program and is never opened"),
    "disguised-pickle": (disguised, "model.safetensors is a pickle, which could run any program"),
    "nan": (spoil, "the weights' hash is "),
}


@pytest.mark.parametrize(("damage", "expected"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_bad_checkpoints(
    run_here: Command, tiny_checkpoint: Path, tmp_path: Path, damage: Callable[[Path], object], expected: str
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    damage(folder)
    before = listing(tmp_path)
    assert expected in error_line(run_here("export", "--checkpoint", folder, "--output", tmp_path / "out"), 2)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("kind", ["folder", "empty-folder", "file", "dangling-link"])
def test_an_existing_output_is_refused_and_untouched(
    run_cli: Command, tiny_checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    output = tmp_path / "out"
    if kind == "dangling-link":
        output.symlink_to("nowhere")
    elif kind == "file":
        output.write_bytes(b"mine")
    else:
        output.mkdir()
        if kind == "folder":
            (output / "model").write_bytes(b"mine")
    before = listing(tmp_path)
    line = error_line(run_cli("export", "--checkpoint", tiny_checkpoint, "--output", output), 2)
    assert line == f"{output} exists already; name another path or remove it"
    assert listing(tmp_path) == before


def request_to(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A request of 4 events and 3 candidates, changed."""
    schema = preset("tiny").schema
    request = request_of(schema, events=4, candidates=3)
    given = {
        "history": as_rows(request.history),
        "profile": {name: value.tolist() for name, value in request.profile.items()},
        "candidates": as_rows(request.candidates),
    }
    change(given)
    path.write_text(json.dumps({"requests": [given]}))
    return path


REQUESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "nan-in-an-event": (
        lambda r: r["history"][2].update(price=float("nan")),
        "request 0: history: price of event 2 is nan; numeric features take finite float32 numbers",
    ),
    "nan-in-the-profile": (
        lambda r: r["profile"].update(days_active=float("nan")),
        "request 0: profile: days_active of user 0 is nan",
    ),
    "infinite-candidate": (
        lambda r: r["candidates"][1].update(popularity=float("inf")),
        "request 0: candidates: popularity of candidate 1 is inf",
    ),
    "string-id": (
        lambda r: r["candidates"][0].update(item_id="7"),
        "item_id of candidate 0 is '7' (str); ids are integers from 0 to 2000",
    ),
    "float-id": (lambda r: r["history"][0].update(item_id=7.0), "item_id of event 0 is 7.0; ids are integers"),
    "missing-candidate-feature": (
        lambda r: r["candidates"][2].pop("tags"),
        "candidate 2: feature 'tags' is missing; needed are item_id, category, tags",
    ),
    "missing-profile-feature": (lambda r: r["profile"].pop("age"), "feature 'age' is missing"),
    "unknown-behaviour": (lambda r: r["history"][0].update(behaviour="stare"), "behaviour of event 0 is 'stare'"),
    "no-history": (lambda r: r.pop("history"), "key 'history' is missing; needed are history, profile, candidates"),
    "no-candidates": (lambda r: r.update(candidates=[]), "there are 0 candidates; give at least one to score"),
    "too-many-candidates": (
        lambda r: r.update(candidates=r["candidates"][:1] * 2049),
        "request 0: 2049 candidates were given; this bundle takes 1 to 2048: score them in parts",
    ),
}


@pytest.mark.parametrize(("change", "expected"), REQUESTS.values(), ids=REQUESTS)
def test_bad_requests(
    run_here: Command, tiny_bundle: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], expected: str
) -> None:
    path = request_to(tmp_path / "requests.json", change)
    before = listing(tmp_path)
    line = error_line(run_here("score", tiny_bundle, "--input", path, "--output", tmp_path / "out.json"), 2)
    assert line.startswith(str(path))
    assert expected in line
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "is missing; give a JSON file of requests or a log folder"),
        (b"", "is not JSON"),
        (b"{]", "is not JSON: Expecting property name"),
        (b"[]", "holds no request; give at least one"),
        (b"\xff\xfe\x00", "cannot be read as JSON"),
        (b"[" * 100_000, "is nested too deeply"),
    ],
    ids=["missing", "empty", "malformed", "no-request", "not-text", "deep"],
)
def test_bad_request_files(
    run_here: Command, tiny_bundle: Path, tmp_path: Path, content: bytes | None, expected: str
) -> None:
    path = tmp_path / "a :bomb: [red]file[bold].json"  # printed as it is
    if content is not None:
        path.write_bytes(content)
    line = error_line(run_here("score", tiny_bundle, "--input", path), 2)
    assert line.startswith(str(path))
    assert expected in line


def test_a_damaged_bundle_is_one_line_in_every_command(run_cli: Command, bundle: Path, tmp_path: Path) -> None:
    with (bundle / "weights.safetensors").open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))
    requests = request_to(tmp_path / "requests.json", lambda r: None)
    before = listing(tmp_path)
    for args in (
        ("verify",),
        ("inspect",),
        ("score", "--input", requests, "--output", tmp_path / "out.json"),
        ("bench",),
    ):
        line = error_line(run_cli(args[0], bundle, *args[1:]), 2)
        path = bundle / "weights.safetensors"
        assert line == f"{path} was changed since it was written (sha256 differs); export the bundle again"
    assert listing(tmp_path) == before


def test_an_output_below_a_file(run_here: Command, tiny_bundle: Path, requests_file: Path, tmp_path: Path) -> None:
    """Clean-up fails there as well; the line is about the first failure."""
    file = tmp_path / "file"
    file.write_text("")
    before = listing(tmp_path)
    for output in (file / "out.json", file / "new" / "out.json"):
        done = run_here("score", tiny_bundle, "--input", requests_file, "--output", output)
        assert error_line(done, 1).startswith(f"{output} could not be written: ")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("write", [write_new_text, replace_text], ids=lambda write: write.__name__)
def test_a_failed_clean_up_does_not_hide_why_it_was_needed(
    write: Callable[[Path, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only file system refuses to make a file and, even where none is there, to remove it."""

    def refuse(path: Path, *args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", lambda *args, **options: refuse(Path("first")))
        with pytest.raises(JobError, match=r"could not be written: \[Errno 30\] Read-only file system: 'first'"):
            write(tmp_path / "out", "text")
        full.setattr(Path, "write_text", lambda *args, **options: 1 / 0)  # a defect or a signal stays what it is
        with pytest.raises(ZeroDivisionError):
            write(tmp_path / "out", "text")
    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(JobError, match=r"could not be written: \[Errno 30\]"):
        write(tmp_path / "out", "text")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "status", "last"),
    [(signal.SIGINT, 130, "error: interrupted"), (signal.SIGTERM, 143, None)],
    ids=["ctrl-c", "terminated"],
)
def test_a_stopped_export_leaves_nothing(
    one_layer_checkpoint: Path, tmp_path: Path, sent: signal.Signals, status: int, last: str | None
) -> None:
    command = [*MAIN, "export", "--checkpoint", str(one_layer_checkpoint), "--output", str(tmp_path / "new" / "out")]
    # A suite that a shell runs in the background ignores ^C, and so would the command: as at a terminal, it does not.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=heard) as process:
        assert process.stderr
        first = [process.stderr.readline(), process.stderr.readline()]
        assert first[1].endswith(": capture\n")
        time.sleep(0.5)
        assert len(list((tmp_path / "new").iterdir())) == 1
        process.send_signal(sent)
        output, rest = process.communicate(timeout=60)
    assert (process.returncode, output) == (status, "")
    assert rest.split("\n") == ["", last, ""] if last else rest == ""  # the first ends the line of a terminal's ^C
    assert listing(tmp_path) == {}


def test_a_reader_that_leaves_is_no_error(tiny_bundle: Path) -> None:
    for args in (("doctor", "--json"), ("doctor",), ("--help",), ("verify", str(tiny_bundle))):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run([*MAIN, *args], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
        os.close(write)
        assert done.returncode == 1
        assert [line for line in done.stderr.splitlines() if not line.startswith("verifying ")] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("args", [("doctor",), ("doctor", "--json"), ("--help",)], ids=" ".join)
def test_a_full_disk_behind_stdout(args: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*MAIN, *args], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: the operating system refused: [Errno 28] No space left on device\n"


def test_an_internal_error_is_one_line_with_a_way_to_see_more(run_cli: Command, tmp_path: Path) -> None:
    """A numpy that cannot be imported stands for a defect of ours."""
    (tmp_path / "numpy.py").write_text("raise RuntimeError('two\\nlines')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run_cli("doctor", env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0  # doctor imports next to nothing
    done = run_cli("inspect", "none", env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: internal error, please report it: RuntimeError: two lines (ONETRANS_TRACEBACK=1 shows where)\n"
    )
    done = run_cli("inspect", "none", env={**os.environ, "PYTHONPATH": path, "ONETRANS_TRACEBACK": "1"})
    assert done.returncode == 1
    assert "Traceback" in done.stderr
