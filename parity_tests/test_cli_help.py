"""What the command line says of itself: help in sentences, examples that parse, suggestions, completion.

`python -m parity_tests.test_cli_help` writes the help texts into docs/cli.md.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from onetrans.cli.main import COMMANDS, EXAMPLES, cli
from onetrans.cli.options import Choice, Verb
from parity_tests.conftest import Command, error_line

PAGE = Path(__file__).resolve().parents[1] / "docs/cli.md"
NUMBERS = (click.IntRange, click.FloatRange, click.types.IntParamType, click.types.FloatParamType)


def verb(name: str) -> Verb:
    command = cli.get_command(click.Context(cli), name)
    assert isinstance(command, Verb)
    return command


def context(name: str) -> click.Context:
    """As the command line makes it; click keeps the help option of the first context that it sees."""
    return click.Context(
        verb(name), info_name=f"onetrans {name}", terminal_width=80, help_option_names=["-h", "--help"]
    )


def options() -> Iterator[tuple[str, click.Option]]:
    for name in COMMANDS:
        for param in verb(name).get_params(context(name)):
            if isinstance(param, click.Option):
                yield name, param
    for param in cli.get_params(click.Context(cli, info_name="onetrans", help_option_names=["-h", "--help"])):
        assert isinstance(param, click.Option)
        yield "onetrans", param


OPTIONS = [pytest.param(name, option, id=f"{name} {option.opts[-1]}") for name, option in options()]


def assert_is_a_sentence(text: str) -> None:
    assert re.match(r"[A-Z][\w']* \S+ ", text), text  # three words or more, the first with a capital
    assert text.endswith("."), text
    assert not text.startswith("Of "), text
    assert text == " ".join(text.split()), text
    assert "[default" not in text, text  # stated through click, so that it is right


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_the_help_of_an_option_is_a_sentence(command: str, option: click.Option) -> None:
    assert option.help
    assert_is_a_sentence(option.help)


@pytest.mark.parametrize(("command", "option"), [case for case in OPTIONS if isinstance(case.values[1].type, NUMBERS)])
def test_a_number_states_its_range_and_default(command: str, option: click.Option) -> None:
    assert isinstance(option.type, click.IntRange | click.FloatRange)
    extra = option.get_help_extra(context(command))
    assert re.search(r"at least \d|above \d|\d to \d", extra["range"]), extra
    assert option.required or extra["default"]
    units = r"number of|seconds|milliseconds|requests per second|share|seed|exponent|rate"
    assert re.search(rf"\b(?:{units})\b", option.help or ""), option.help


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_what_is_chosen_or_sized_states_a_default(command: str, option: click.Option) -> None:
    if isinstance(option.type, Choice) and option.name not in ("name", "preset"):
        assert option.get_help_extra(context(command))["default"]
    if option.opts[0].endswith("-memory"):
        assert re.search(r"\d[A-Z]i?B", option.help or "")
        assert option.required or option.show_default


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_help(run_here: Command, command: str) -> None:
    done = run_here(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    found = verb(command)
    paragraphs = [" ".join(text.split()) for text in (found.help or "").split("\n\n")]
    assert paragraphs[0] == COMMANDS[command]  # the list of commands says the same
    for text in paragraphs:
        assert_is_a_sentence(text)
    *_, heading, examples = re.split(r"^(Examples?:)\n", done.stdout, flags=re.M)
    assert heading == ("Example:" if len(found.examples) == 1 else "Examples:")
    assert [line.strip() for line in examples.splitlines()] == list(found.examples)


def parse(words: list[str]) -> str:
    """The command that a line names, its options and arguments taken apart by click."""
    assert words[0] == "onetrans"
    with cli.make_context("onetrans", words[1:]) as group:
        name, command, rest = cli.resolve_command(group, [*group._protected_args, *group.args])
    assert command is not None
    if rest != ["--help"]:
        command.make_context(name, rest)
    assert name is not None
    return name


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_parse(command: str) -> None:
    for example in verb(command).examples:
        assert parse(shlex.split(example)) == command


def test_the_groups_examples_parse_and_end_its_help(run_here: Command) -> None:
    assert {parse(shlex.split(example)) for example in EXAMPLES} == {"verify"}
    assert run_here("--help").stdout.endswith(f"Examples:\n  {EXAMPLES[0]}\n  {EXAMPLES[1]}\n")
    for text in (cli.help or "", *COMMANDS.values()):
        assert_is_a_sentence(text)


@pytest.mark.parametrize("command", ["verify", "inspect", "score", "doctor"])
def test_the_first_example_runs_as_typed(
    run_here: Command,
    tiny_bundle: Path,
    requests_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    (tmp_path / "bundle").symlink_to(tiny_bundle)
    monkeypatch.chdir(tmp_path)
    assert requests_file == tmp_path / "requests.json"
    words = shlex.split(verb(command).examples[0])
    done = run_here(*words[1:])
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["verfy"], "No such command 'verfy'. Did you mean 'verify'?"),
        (["scores", "bundle"], "No such command 'scores'. Did you mean 'score'?"),
        (["frobnicate"], f"No such command 'frobnicate'. The commands are {', '.join(COMMANDS)}."),
        (["train", "--preset", "tinny", "--output", "x"], "Did you mean 'tiny'?"),
        (["export", "--preset", "onetrans-m", "--random-weights", "--output", "x"], "Did you mean 'onetrans-"),
        (["export", "--checkpoint", "x", "--target", "onxx", "--output", "x"], "Did you mean 'onnx'?"),
        (["score", "b", "--input", "x", "--reuse", "exactly"], "Did you mean 'exact'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_misspelt_name_is_answered_with_the_nearest(run_here: Command, args: list[str], expected: str) -> None:
    assert expected in error_line(run_here(*args), 2)


def test_a_misspelt_option_is_answered_with_those_near_it(run_here: Command) -> None:
    line = error_line(run_here("score", "bundle", "--limitt", "2"), 2)
    assert re.search(r"(?i)(did you mean|possible options).*--limit\b", line)


def completions(run_cli: Command, *words: str) -> list[str]:
    """What bash would offer for the last word."""
    given = {"_ONETRANS_COMPLETE": "bash_complete", "COMP_WORDS": shlex.join(words), "COMP_CWORD": str(len(words) - 1)}
    done = run_cli(env={**os.environ, **given})
    assert done.stderr == ""
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_the_shell_completes_commands_options_and_choices(run_cli: Command) -> None:
    assert completions(run_cli, "onetrans", "") == list(COMMANDS)
    assert completions(run_cli, "onetrans", "ver") == ["verify"]
    assert completions(run_cli, "onetrans", "verify", "bundle", "--th") == ["--threads"]
    assert completions(run_cli, "onetrans", "export", "--preset", "t") == ["tiny"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script(run_cli: Command, shell: str) -> None:
    done = run_cli(env={**os.environ, "_ONETRANS_COMPLETE": f"{shell}_source"})
    assert "_ONETRANS_COMPLETE" in done.stdout
    assert "onetrans" in done.stdout
    assert done.returncode == 0, done.stderr


def page_with_help_texts(page: str) -> str:
    """The page, with the help text of each command at the end of its section."""
    head, *sections = page.split("\n### ")
    names = [section.partition("\n")[0] for section in sections]
    assert names == list(COMMANDS)
    for index, name in enumerate(names):
        told = sections[index].partition("```text\n")[0].rstrip()
        sections[index] = f"{told}\n\n```text\n{verb(name).get_help(context(name))}\n```\n"
    return "\n### ".join([head, *sections])


def test_the_page_has_what_help_prints() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == page_with_help_texts(page), "write it anew: python -m parity_tests.test_cli_help"


if __name__ == "__main__":
    PAGE.write_text(page_with_help_texts(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
