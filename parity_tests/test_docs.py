"""README and docs: links lead somewhere, what is named exists, and snippets and commands run as typed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from onetrans.cli.main import COMMANDS, cli
from onetrans.features.logs import write_logs
from onetrans.features.requests import read_requests
from onetrans.model.presets import preset
from onetrans.model.training.config import SyntheticConfig

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")), *sorted((ROOT / "docs").glob("*.md"))]
MEASURING = ("python -m benchmarks", "make bench", "make gpu")  # minutes to hours: they must parse, and are not run
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.S | re.M)


def blocks(page: Path, language: str) -> list[str]:
    return [body for found, body in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def commands(page: Path) -> Iterator[str]:
    """Every command of a page's shell blocks, without its comment."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            command = " ".join(shlex.split(line, comments=True, posix=False))
            if command:
                yield command


def cli_commands(page: Path) -> list[list[str]]:
    return [shlex.split(line) for line in commands(page) if line.startswith("onetrans")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    rooms = "src|docs|parity_tests|benchmarks|export|features|model|kernels|runtime|parity|bench|sizing|cli"
    for name in re.findall(rf"`((?:{rooms})/[\w./]+\w)", page.read_text(encoding="utf-8")):
        path = name.split(":")[0]
        assert (ROOT / path).exists() or (ROOT / "src/onetrans" / path).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse_with_the_options_they_name(page: Path) -> None:
    for words in cli_commands(page):
        name, arguments = ("export", words[1:]) if words[0] == "onetrans-export" else (words[1], words[2:])
        command = cli.get_command(click.Context(cli), name)
        assert command is not None, words
        command.make_context(name, list(arguments))


def test_the_readme_names_every_command_and_make_targets_that_exist() -> None:
    readme = README.read_text(encoding="utf-8")
    assert all(f"onetrans {name}" in readme for name in COMMANDS)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    typed = [shlex.split(line) for page in PAGES for line in commands(page) if line.startswith("make ")]
    assert ["make", "demo"] in typed
    for words in typed:
        assert re.search(rf"^{words[1]}:", makefile, re.M), words


def test_the_readmes_request_is_one_that_the_preset_takes(tmp_path: Path) -> None:
    (request,) = read_requests(write_request(tmp_path), preset("tiny").schema)
    assert [candidate["item_id"] for candidate in request.candidates] == [40]


def write_request(folder: Path) -> Path:
    (block,) = blocks(README, "json")
    path = folder / "requests.json"
    path.write_text(block, encoding="utf-8")
    return path


def run(command: list[str], folder: Path) -> str:
    """Runs a command of a page in a folder, with the scripts of this interpreter's environment on the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_and_commands_run_as_typed(
    page: Path, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """In one folder, in the page's order; `onetrans train` alone is not repeated: the demo types it."""
    write_request(tmp_path)
    outputs = {words[words.index("--output") + 1] for words in cli_commands(page) if "--output" in words}
    for name, source in (("checkpoint", tiny_checkpoint), ("bundle", tiny_bundle)):
        if name not in outputs:
            shutil.copytree(source, tmp_path / name)
    snippets: list[str] = []
    for language, body in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            snippets.append(body)
        elif language == "sh":
            for line in body.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:2] == ["onetrans", "train"]:
                    shutil.copytree(tiny_checkpoint, tmp_path / words[words.index("--output") + 1])
                    if "--write-logs" in words:
                        logs = SyntheticConfig(users=20, requests_per_user=2).logs(preset("tiny"))
                        write_logs(logs, tmp_path / words[words.index("--write-logs") + 1])
                elif words and words[0].startswith("onetrans"):
                    run(words, tmp_path)
                elif words and words[0] not in ("make", "pip") and not line.startswith(MEASURING):
                    run(["bash", "-euc", line], tmp_path)
    if snippets:  # those of a page are typed into one interpreter
        run([sys.executable, "-c", "\n".join(snippets)], tmp_path)


def test_there_are_snippets_and_commands_to_run() -> None:
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 5
    assert sum(len(cli_commands(page)) for page in PAGES) >= 15
    assert [words[1] for words in cli_commands(README)] == ["train", "--checkpoint", "verify", "score", "bench"]


def test_ci_runs_the_readmes_commands() -> None:
    text = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert text.index("make test") < text.index("make demo")


def test_the_picture_is_that_of_onetrans_s() -> None:
    svg = (ROOT / "docs/split.svg").read_text(encoding="utf-8")
    for text in ("onetrans-s", "k0, v0 [U, L, 4, 64]", "k5, v5", "prefill: once per user", "decode: per candidate"):
        assert text in svg


def test_each_kind_of_extension_takes_at_most_three_files() -> None:
    """docs/extending.md numbers them, each with a link to the place."""
    _, *sections = (ROOT / "docs/extending.md").read_text(encoding="utf-8").split("\n## ")
    steps = {section.partition("\n")[0]: re.split(r"\n\d\. ", section)[1:] for section in sections}
    for kind in ("A target", "A device", "A precision", "A model family", "A semantic op", "A pass"):
        assert 1 <= len(steps[kind]) <= 3, kind
        assert all("](../src/onetrans/" in step for step in steps[kind]), kind
