"""The options of the state cache, for the commands that rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, get_args

import click

from onetrans.cli.options import ABOVE_0, Choice, folder_option, typed_options
from onetrans.errors import ConfigError
from onetrans.runtime.cache.config import OFFLOAD_PRECISIONS, CacheConfig, parse_bytes
from onetrans.runtime.cache.lookup import Reuse


class Size(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """Bytes, written with their unit."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        if isinstance(value, int):
            return value
        try:
            return parse_bytes(value)
        except ConfigError as error:
            raise click.UsageError(f"{param.opts[0] if param else 'value'}: {error}", ctx) from error


SIZE = Size()

FIELDS = ("state_memory", "ttl", "reuse", "offload", "offload_memory", "offload_precision")
DEFAULTS = {field: getattr(CacheConfig, field) for field in FIELDS}

OPTIONS = (
    click.option(
        "--state-memory",
        type=SIZE,
        show_default="no state is kept",
        help="The memory for the states of returning users, such as 4GiB or 500MB; it must hold at least two states.",
    ),
    click.option(
        "--ttl", type=ABOVE_0, show_default="no limit", help="The seconds after which a state is computed anew."
    ),
    click.option(
        "--reuse",
        type=Choice(get_args(Reuse)),
        default=DEFAULTS["reuse"],
        show_default=True,
        help="Which states may be reused: exact gives the scores of a fresh prefill; stale also reuses states whose"
        " windows have moved since, and measures how far the scores drift.",
    ),
    folder_option(
        "--offload",
        show_default="none",
        help="The folder, on a disk, for states that do not fit into --state-memory.",
    ),
    click.option(
        "--offload-memory",
        type=SIZE,
        show_default="none",
        help="The disk space for offloaded states, such as 50GiB or 500MB; it must hold at least one state.",
    ),
    click.option(
        "--offload-precision",
        type=Choice(OFFLOAD_PRECISIONS),
        default=DEFAULTS["offload_precision"],
        show_default=True,
        help="The precision of offloaded states: that of the bundle, or float16, which takes half the space of float32"
        " and rounds.",
    ),
)


def cache_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the options, and their `CacheConfig` (None without --state-memory) as `cache`."""

    @wraps(command)
    def with_cache(*args: Any, **kwargs: Any) -> Any:
        values = {field: kwargs.pop(field) for field in FIELDS}
        return command(*args, cache=_config(values), **kwargs)

    for option in reversed(OPTIONS):
        with_cache = option(with_cache)
    return with_cache


def _config(values: dict[str, Any]) -> CacheConfig | None:
    if values["state_memory"] is None:
        for name in typed_options(*FIELDS):
            raise ConfigError(f"{name} is about kept states; give --state-memory as well, such as 4GiB")
        return None
    if (values["offload"] is None) != (not values["offload_memory"]):
        raise ConfigError("--offload names a folder and --offload-memory its bytes; give both or neither")
    return CacheConfig(**{field: value for field, value in values.items() if value is not None})
