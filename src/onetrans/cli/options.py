"""What the commands share: a command class whose help ends with examples, value types, and common options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource


class Verb(click.Command):
    """A command whose help ends with command lines that work."""

    def __init__(self, *args: Any, examples: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the examples, one a line."""
        write_examples(self.examples, formatter)


def write_examples(examples: Sequence[str], formatter: click.HelpFormatter) -> None:
    """Ends a help text with examples; lines are not wrapped, so that they can be copied."""
    with formatter.section("Example" if len(examples) == 1 else "Examples"):
        formatter.write("".join(f"{'':{formatter.current_indent}}{example}\n" for example in examples))


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """A sentence that names the nearest of the known names, with a space before it; nothing where none is near."""
    near = get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


class Choice(click.Choice):  # type: ignore[type-arg]  # generic from click 8.2 on
    """One of some names; a misspelt one is answered with the nearest."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The name, which must be one of the choices."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            known = [str(choice) for choice in self.choices]
            allowed = ", ".join(map(repr, known))
            self.fail(f"{value!r} is not one of {allowed}.{did_you_mean(str(value), known)}", param, ctx)


def _range(type_: click.IntRange | click.FloatRange) -> str:
    low = "" if type_.min is None else f"{'above' if type_.min_open else 'at least'} {_number(type_.min)}"
    if type_.max is None:
        return low
    if type_.min is not None and not type_.min_open:
        return f"{_number(type_.min)} to {_number(type_.max)}"
    return " and ".join(filter(None, (low, f"at most {_number(type_.max)}")))


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) and abs(value) < 1e9 else f"{value:g}"


def _check(value: float, range_: str, inside: bool, param: click.Parameter | None, ctx: click.Context | None) -> None:
    if not inside:
        name = param.opts[0] if param else "value"
        raise click.UsageError(f"{name} is {value}; it must be {range_}", ctx)


class Whole(click.IntRange):
    """A whole number within bounds, which the help and the error state in plain words."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number, which must lie within the bounds."""
        number: int = click.INT.convert(value, param, ctx)
        inside = (self.min is None or number >= self.min) and (self.max is None or number <= self.max)
        _check(number, _range(self), inside, param, ctx)
        return number

    def _describe_range(self) -> str:
        return _range(self)


class Real(click.FloatRange):
    """A number within bounds, which the help and the error state in plain words; never NaN."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, which must lie within the bounds."""
        number: float = click.FLOAT.convert(value, param, ctx)
        above = self.min is None or (number > self.min if self.min_open else number >= self.min)
        below = self.max is None or number <= self.max
        _check(number, _range(self), above and below and number == number, param, ctx)
        return number

    def _describe_range(self) -> str:
        return _range(self)


ABOVE_0 = Real(min=0, min_open=True)
FROM_1 = Whole(min=1)
FROM_0 = Whole(min=0)


def file_option(*names: str, **attributes: Any) -> Callable[[Any], Any]:
    """An option that takes the path of a file."""
    return click.option(*names, type=click.Path(path_type=Path), metavar="FILE", **attributes)


def folder_option(*names: str, **attributes: Any) -> Callable[[Any], Any]:
    """An option that takes the path of a folder."""
    return click.option(*names, type=click.Path(path_type=Path), metavar="FOLDER", **attributes)


bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout, and nothing else there."
)
device_option = click.option(
    "--device",
    show_default="the first one of the bundle's target",
    help="The device to compute on, such as cpu; no other is tried.",
)
threads_option = click.option(
    "--threads", type=FROM_1, show_default="the backend's choice", help="The number of CPU threads of the backend."
)


def typed_options(*names: str) -> list[str]:
    """Those of the running command's parameters that the user typed, as option names."""
    context = click.get_current_context()
    options = {param.name: param.opts[0] for param in context.command.params}
    return [options[name] for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
