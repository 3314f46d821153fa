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

from onetrans import __version__
from onetrans.cli.console import stderr
from onetrans.errors import MissingDependencyError, OneTransError

COMMANDS = {
    "train": "train a preset on logs, or on synthetic ones",
    "export": "turn a checkpoint into a verified bundle",
    "verify": "compare a bundle with its float64 gold",
    "inspect": "show how the graph was split, and draw it",
    "score": "score requests from JSON or Parquet",
    "bench": "measure p50, p95 and p99 per component",
    "plan": "say how many machines a load needs",
    "doctor": "say what this machine can run",
}


class _LazyGroup(click.Group):
    """Imports a command when it is asked for, so that serving does not import torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"onetrans.cli.{cmd_name}"), f"{cmd_name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="onetrans")
@click.option("-v", "--verbose", is_flag=True, help="Log every pass and stage on stderr.")
def cli(verbose: bool) -> None:
    """OneTrans Export: a trained OneTrans goes in, a verified, servable bundle comes out."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("onetrans").setLevel(logging.INFO if verbose else logging.WARNING)


def main() -> None:
    """The `onetrans` command."""
    sys.exit(_start(sys.argv[1:]))


def export_main() -> None:
    """The `onetrans-export` command: the same as `onetrans export`."""
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
        extra = "serve" if package in ("onnxruntime", "pyarrow") else "cpu"
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
