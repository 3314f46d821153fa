"""`onetrans` and `onetrans-export`: every failure becomes one line and an exit status.

0 done; 1 the job failed (parity, disk full, an internal fault); 2 what was given is wrong; 130 interrupted; 143
terminated.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import logging
import os
import signal
import sys
from types import FrameType
from typing import Any

import click
from click.shell_completion import CompletionItem

from onetrans import __version__
from onetrans.cli.console import stderr
from onetrans.cli.options import did_you_mean, write_examples
from onetrans.errors import MissingDependencyError, OneTransError
from onetrans.runtime.targets import extra_of

COMMANDS = {
    "train": "Train a model on logs, or on a synthetic log.",
    "export": "Turn a checkpoint into a verified bundle.",
    "verify": "Compare a bundle's scores with the float64 reference.",
    "inspect": "Show how a bundle's graph was split, and draw it.",
    "score": "Score requests with a bundle.",
    "bench": "Measure the latency of a bundle.",
    "plan": "Say how many machines a load needs, and what limits them.",
    "doctor": "Say what this machine can run.",
}
EXAMPLES = ("onetrans --verbose verify bundle", "onetrans verify --help")


class _LazyGroup(click.Group):
    """Imports a command when it is asked for, so that serving does not import torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"onetrans.cli.{cmd_name}"), f"{cmd_name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            hint = did_you_mean(args[0], list(COMMANDS)) or f" The commands are {', '.join(COMMANDS)}."
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names the commands without importing them, which would take seconds at a press of a key."""
        commands = [CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)]
        return commands + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(EXAMPLES, formatter)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="onetrans", help="Show the version and exit.")
@click.option("-v", "--verbose", is_flag=True, help="Log every pass and stage on stderr.")
def cli(verbose: bool) -> None:
    """Turn a trained OneTrans model into a verified bundle, and serve it."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("onetrans").setLevel(logging.INFO if verbose else logging.WARNING)


def main() -> None:
    """Run the `onetrans` command."""
    sys.exit(_start(sys.argv[1:]))


def export_main() -> None:
    """Run the `onetrans-export` command, which is `onetrans export`."""
    sys.exit(_start(["export", *sys.argv[1:]]))


def _start(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, _terminate)
    atexit.register(gc.freeze)  # the interpreter need not search a traced model for garbage before it ends
    return run(cli, arguments)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)  # unwinds, so that unfinished output is removed


def run(command: click.Command, arguments: list[str]) -> int:
    """Runs a command line and returns its exit status."""
    try:
        result: Any = command.main(args=arguments or ["--help"], prog_name="onetrans", standalone_mode=False)
        _flush_stdout()
    except OneTransError as error:
        return _fail(str(error), error.exit_status)
    except click.UsageError as error:
        hint = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
        return _fail(error.format_message() + hint, 2)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except BrokenPipeError:
        return 1  # whoever read the output has seen enough
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "onetrans"):
            return _fail_internally(error)
        extra = "serve" if package == "pyarrow" else extra_of(package) or "cpu"
        needed = f'this needs {package}, which is not installed: pip install "onetrans-export[{extra}]"'
        return _fail(f"{needed} (`onetrans doctor` shows what is missing)", MissingDependencyError.exit_status)
    except OSError as error:
        return _fail(f"the operating system refused: {error}", 1)
    except Exception as error:
        return _fail_internally(error)
    return result if isinstance(result, int) else 0


def _fail_internally(error: Exception) -> int:
    if os.environ.get("ONETRANS_TRACEBACK"):
        raise error
    kind = type(error).__name__
    return _fail(f"internal error, please report it: {kind}: {error} (ONETRANS_TRACEBACK=1 shows where)", 1)


def _flush_stdout() -> None:
    """Flushes here, where a closed pipe or a full disk is still reported, and not again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _fail(message: str, status: int) -> int:
    stderr().print("error:", " ".join(message.split()), markup=False, style="red" if stderr().is_terminal else None)
    return status


if __name__ == "__main__":
    main()
