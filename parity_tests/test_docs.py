from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from onetrans.cli.main import COMMANDS, cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    for name in re.findall(
        r"`((?:src|docs|parity_tests|benchmarks|export|features|model|kernels|runtime)/[\w./]+\w)", page.read_text()
    ):
        path = name.split(":")[0]
        assert (ROOT / path).exists() or (ROOT / "src/onetrans" / path).exists(), name


def commands_in(text: str) -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line]


def test_the_readmes_commands_parse_with_the_options_they_name():
    found = [c for page in PAGES for c in commands_in(page.read_text()) if c[0].startswith("onetrans")]
    assert len(found) >= 5
    for words in found:
        name, arguments = ("export", words[1:]) if words[0] == "onetrans-export" else (words[1], words[2:])
        command = cli.get_command(click.Context(cli), name)
        assert command is not None, words
        command.make_context(name, list(arguments))


def test_the_readme_names_every_command_and_make_target():
    readme = (ROOT / "README.md").read_text()
    assert all(f"onetrans {name}" in readme for name in COMMANDS)
    makefile = (ROOT / "Makefile").read_text()
    for words in commands_in(readme):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.M), words


def test_the_readmes_request_is_one_that_the_preset_takes(tmp_path):
    from onetrans.features.requests import read_requests
    from onetrans.model.presets import preset

    (block,) = re.findall(r"```json\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "requests.json").write_text(block)
    (request,) = read_requests(tmp_path / "requests.json", preset("tiny").schema)
    assert [candidate["item_id"] for candidate in request.candidates] == [40]


def test_ci_runs_the_readmes_commands():
    run = (ROOT / ".ci/run").read_text()
    assert run.index("make test") < run.index("make demo")


def test_the_picture_is_that_of_onetrans_s():
    svg = (ROOT / "docs/split.svg").read_text()
    for text in ("onetrans-s", "k0, v0 [U, L, 4, 64]", "k5, v5", "prefill: once per user", "decode: per candidate"):
        assert text in svg
