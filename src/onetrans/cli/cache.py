"""Options of the state cache, for the verbs that rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, get_args

import click

from onetrans.errors import ConfigError
from onetrans.runtime.cache.config import OFFLOAD_PRECISIONS, CacheConfig, parse_bytes
from onetrans.runtime.cache.lookup import Reuse

OPTIONS = (
    click.option("--state-memory", help="Keep the states of returning users in this much memory, as 4GiB."),
    click.option("--ttl", type=float, help="Seconds after which a state is computed anew.  [default: no limit]"),
    click.option(
        "--reuse",
        type=click.Choice(get_args(Reuse)),
        help="exact: scores of a fresh prefill; stale: carry states across anchors, and measure the drift."
        "  [default: exact]",
    ),
    click.option("--offload", type=click.Path(path_type=Path), help="Folder for states that do not fit the memory."),
    click.option("--offload-memory", help="Bytes there, as 50GiB."),
    click.option(
        "--offload-precision", type=click.Choice(OFFLOAD_PRECISIONS), help="Of states there.  [default: same]"
    ),
)


def cache_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the options, and their `CacheConfig` (None without --state-memory) as `cache`."""

    @wraps(command)
    def with_cache(
        *args: Any, state_memory: str | None, offload: Path | None, offload_memory: str | None, **kwargs: Any
    ) -> Any:
        named = {name: kwargs.pop(name) for name in ("ttl", "reuse", "offload_precision")}
        given = {name: value for name, value in {**named, "offload": offload}.items() if value is not None}
        if state_memory is None:
            if given or offload_memory is not None:
                name = next(iter(given), "offload_memory").replace("_", "-")
                raise ConfigError(f"--{name} is about kept states; give --state-memory as well, as 4GiB")
            return command(*args, cache=None, **kwargs)
        config = CacheConfig(
            state_memory=parse_bytes(state_memory),
            offload_memory=0 if offload_memory is None else parse_bytes(offload_memory),
            **given,
        )
        return command(*args, cache=config, **kwargs)

    for option in reversed(OPTIONS):
        with_cache = option(with_cache)
    return with_cache
