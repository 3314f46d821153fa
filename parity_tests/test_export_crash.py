"""A writer that is killed, or that the disk refuses, leaves nothing that looks finished; the next one cleans up."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from onetrans.errors import JobError, OutputExistsError
from onetrans.files import new_folder, replace_text, write_new_text
from onetrans.model.checkpoint import save_checkpoint
from onetrans.model.onetrans import OneTrans
from onetrans.runtime import Bundle
from parity_tests.conftest import MAIN, Command, error_line, listing

UNFINISHED = re.compile(r"\.out\.(\d+)\.[0-9a-f]{8}\.unfinished")


def export_command(checkpoint: Path, output: Path) -> list[str]:
    return [*MAIN, "export", "--checkpoint", str(checkpoint), "--output", str(output)]


@pytest.fixture(scope="module")
def rerun(
    tiny_checkpoint: Path, one_layer_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """SIGKILL at three stages, each run over the leftover of the one before; then `onetrans-export` is let finish."""
    place = tmp_path_factory.mktemp("killed")
    output = place / "out"
    (place / "other").mkdir()
    leftovers: list[str] = []
    for stage in ("capture", "lower", "verify"):
        command = export_command(one_layer_checkpoint, output)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr
            for line in process.stderr:
                if line.endswith(f": {stage}\n"):
                    break
            process.kill()
        assert process.returncode == -signal.SIGKILL, stage
        assert not output.exists()
        hidden = [path.name for path in place.iterdir() if path.name.startswith(".")]
        assert len(hidden) == 1, (stage, hidden)
        match = UNFINISHED.fullmatch(hidden[0])
        assert match
        assert int(match[1]) == process.pid
        assert not set(hidden) & set(leftovers)
        leftovers += hidden
    assert "weights.safetensors" in listing(place / leftovers[-1])  # the last one was whole but for its name
    code = "from onetrans.cli.main import export_main; export_main()"
    command = [sys.executable, "-c", code, *export_command(tiny_checkpoint, output)[len(MAIN) + 1 :], "--json"]
    return place, subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_killed_exports_left_no_bundle_and_the_next_run_cleans_up(
    rerun: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    place, done = rerun
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in place.iterdir()) == ["other", "out"]
    Bundle.open(place / "out")


@pytest.mark.slow
def test_onetrans_export_is_the_export_command(
    rerun: tuple[Path, subprocess.CompletedProcess[str]], tiny_bundle: Path
) -> None:
    """And it makes the bundle that `onetrans.export.export` made of the same weights."""
    place, done = rerun
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    made, expected = Bundle.open(place / "out").manifest, Bundle.open(tiny_bundle).manifest
    for name in ("append.onnx", "decode.onnx", "prefill.onnx", "weights.safetensors"):
        assert made.files[name] == expected.files[name], name
    assert made.weights_sha256 == expected.weights_sha256
    assert found.keys() == {"bundle", "seconds", "bytes", "state_bytes_per_user", "parity"}
    stated = ("name", "target", "device", "precision", "weights_sha256")
    assert found["bundle"] == {"path": str(place / "out"), **{name: getattr(made, name) for name in stated}}
    sizes = {path.name: path.stat().st_size for path in (place / "out").iterdir()}
    assert found["bytes"] == sum(sizes.values()) - sizes["manifest.json"]
    assert found["state_bytes_per_user"] == expected.bytes_per_user
    assert len(found["parity"]) == 9
    assert all(case["passed"] and case["error"] <= case["bound"] for case in found["parity"])


WRITER = """
import sys, time
from pathlib import Path
from onetrans.files import new_folder
with new_folder(sys.argv[1]) as folder:
    for index in range(200):
        (folder / f"file{index}").write_bytes(bytes(50_000))
        if index == 0:
            print("begun", flush=True)
        time.sleep(float(sys.argv[2]))
print("done", flush=True)
"""


def start_writer(path: Path, pause: float) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(pause)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "begun\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()


@pytest.mark.parametrize("moment", range(8))
def test_killed_at_many_moments(tmp_path: Path, moment: int) -> None:
    """Among them while it flushes and renames: the folder is whole, or it is not there."""
    path = tmp_path / "deep" / "out"
    process = start_writer(path, 0.0)
    timer = threading.Timer(0.02 * moment, process.kill)
    timer.start()
    process.wait()
    timer.cancel()
    kill(process)
    if path.exists():
        assert len(list(path.iterdir())) == 200
        shutil.rmtree(path)
    with new_folder(path) as folder:
        assert [entry.name for entry in path.parent.iterdir()] == [folder.name]
    assert listing(tmp_path).keys() == {"deep", "deep/out"}


def test_a_live_writer_is_left_alone_and_the_slower_one_gives_in(tmp_path: Path) -> None:
    path = tmp_path / "out"
    process = start_writer(path, 60.0)
    theirs = next(tmp_path.iterdir())
    with new_folder(path) as ours:
        (ours / "model").write_bytes(b"ours")
        assert {theirs, ours} == set(tmp_path.iterdir())
    assert {theirs, path} == set(tmp_path.iterdir())
    kill(process)
    with pytest.raises(OutputExistsError), new_folder(path):
        pass
    shutil.rmtree(path)
    write_new_text(path, "ours")
    assert list(tmp_path.iterdir()) == [path]


def test_a_live_writer_in_another_container_is_left_alone(tmp_path: Path) -> None:
    """There its process id says nothing here; its lock does."""
    path = tmp_path / "out"
    with new_folder(path) as ours:
        elsewhere = ours.rename(tmp_path / ".out.999999999.00000000.unfinished")
        with new_folder(path):
            assert elsewhere.exists()
        shutil.rmtree(path)
        elsewhere.rename(ours)
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writers_process_id_may_be_ours(tmp_path: Path) -> None:
    """As in a container that is restarted."""
    leftover = tmp_path / f".out.{os.getpid()}.0123abcd.unfinished"
    leftover.mkdir()
    (leftover / "half").touch()
    os.utime(leftover, (1e9, 1e9))
    with new_folder(tmp_path / "out"):
        assert not leftover.exists()
    assert listing(tmp_path).keys() == {"out"}


def test_one_place_may_be_written_inside_another(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as outer, new_folder(outer / "inner") as inner:
        write_new_text(inner / "text", "x")
    assert listing(tmp_path).keys() == {"out", "out/inner", "out/inner/text"}


@pytest.mark.parametrize(
    "name",
    [
        ".out.unfinished",
        ".out.1.unfinished",
        ".out.x.0123abcd.unfinished",
        ".other.999999999.0123abcd.unfinished",
        ".out.b.999999999.0123abcd.unfinished",
        "out.999999999.0123abcd.unfinished",
        ".outx999999999.0123abcd.unfinished",
    ],
)
def test_what_is_of_another_name_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert listing(tmp_path).keys() == {"out", name}


def test_a_leftover_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / ".out.999999999.0123abcd.unfinished").symlink_to("precious")
    with new_folder(tmp_path / "out"):
        pass
    assert "precious/file" in listing(tmp_path)


def test_threads_that_write_one_place(tmp_path: Path) -> None:
    """One wins; the others are told so; nothing else remains."""

    def write(index: int) -> str:
        try:
            with new_folder(tmp_path / "out") as folder:
                (folder / "who").write_text(str(index))
        except OutputExistsError:
            return ""
        return str(index)

    for _ in range(20):
        with ThreadPoolExecutor(8) as pool:
            winners = [name for name in pool.map(write, range(8)) if name]
        assert [(tmp_path / "out" / "who").read_text()] == winners
        assert listing(tmp_path).keys() == {"out", "out/who"}
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("ours"), KeyboardInterrupt()])
def test_a_failed_block_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    expected = JobError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), new_folder(tmp_path / "a" / "b" / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "half").touch()
        raise error
    assert listing(tmp_path) == {}


def test_a_place_that_fills_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    for make in (Path.mkdir, Path.touch):
        with pytest.raises(OutputExistsError), new_folder(tmp_path / "out"):
            make(tmp_path / "out")
        assert listing(tmp_path).keys() == {"out"}
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o000, 0o644), (0o027, 0o640)])
def test_files_get_the_mode_that_the_umask_leaves(tmp_path: Path, umask: int, expected: int) -> None:
    previous = os.umask(umask)
    try:
        with new_folder(tmp_path / "out") as folder:
            (folder / "sub").mkdir()
            for path in (folder / "private", folder / "sub" / "private"):
                path.touch(0o600)
        write_new_text(tmp_path / "text", "x")
    finally:
        os.umask(previous)
    for path in (tmp_path / "out" / "private", tmp_path / "out" / "sub" / "private", tmp_path / "text"):
        assert oct(stat.S_IMODE(path.stat().st_mode)) == oct(expected)


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for text in ("first", "second"):
        replace_text(path, text)
        assert path.read_text() == text
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "\ud800")
    assert path.read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]


def limit_file_size(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """One mebibyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"this test may not mount a tmpfs here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_an_export_that_the_disk_refuses(one_layer_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """Files may grow to a megabyte; the weights need three."""
    older = Path(shutil.copytree(tiny_bundle, tmp_path / "older"))
    before = listing(tmp_path)
    done = subprocess.run(
        export_command(one_layer_checkpoint, tmp_path / "new" / "out"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        preexec_fn=limit_file_size(1 << 20),
    )
    line = error_line(done, 1)
    assert line.startswith(f"{tmp_path / 'new' / 'out'} could not be written: ")
    assert "File too large" in line
    assert listing(tmp_path) == before
    Bundle.open(older)


def test_a_checkpoint_on_a_full_disk(small_disk: Path, tiny_model: OneTrans) -> None:
    with pytest.raises(JobError, match=r"out could not be written: .*No space left on device") as caught:
        save_checkpoint(tiny_model, small_disk / "new" / "out")
    assert "\n" not in str(caught.value)
    assert listing(small_disk) == {}


def test_small_outputs_on_a_full_disk(small_disk: Path, tiny_bundle: Path, run_cli: Command) -> None:
    old = small_disk / "old.svg"
    old.write_text("<svg>older</svg>")
    with suppress(OSError):
        (small_disk / "filler").write_bytes(bytes(2 << 20))
    before = listing(small_disk)
    line = error_line(run_cli("inspect", tiny_bundle, "--svg", small_disk / "x.svg"), 1)
    assert line == f"{small_disk / 'x.svg'} could not be written: [Errno 28] No space left on device"
    assert listing(small_disk) == before
    error_line(run_cli("inspect", tiny_bundle, "--svg", old), 1)
    assert listing(small_disk) == before
