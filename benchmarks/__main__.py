"""The benchmarks: `python -m benchmarks --suite cpu`. What a record holds of this source and device is not repeated."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.suites import SUITES
from onetrans.errors import ConfigError, OneTransError

KIND = click.Choice(SUITES)
PATH, SECONDS, WHOLE = click.Path(path_type=Path), click.FloatRange(min=1), click.IntRange(min=1)


@click.command(epilog="Example: python -m benchmarks --suite gpu --only decode --output run")
@click.option("--suite", "name", type=KIND, default="cpu", show_default=True, help="Take this suite's measures.")
@click.option("--only", multiple=True, metavar="NAME", help="Take only these: a name, its beginning, a pattern.")
@click.option("--list", "listed", is_flag=True, help="Name the measures and what each should take, and end.")
@click.option("--fresh", is_flag=True, help="Measure again what the record holds already.")
@click.option("--quick", is_flag=True, help="Take few samples, for a look; needs --output, since these are not kept.")
@click.option("--budget", type=SECONDS, help="Start no measure after so many seconds.  [default: 450 of gpu]")
@click.option("--threads", type=WHOLE, default=2, show_default=True, help="Let CPU engines use so many threads.")
@click.option("--work", type=PATH, help="Keep bundles and compiled kernels here.  [default: a temporary folder]")
@click.option("--output", type=PATH, help="Write record, log and tuned table here.  [default: benchmarks/results]")
@click.option("--tune", is_flag=True, help="Time launch configurations, and keep those that win in the tuned table.")
@click.option("--rehearse", is_flag=True, help="Run the gpu suite's code on the CPU at tiny sizes, and keep nothing.")
@click.option("--artefacts", type=PATH, help="Keep each compiled variant's PTX and cubin in this folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the record on stdout.")
@click.option("--commit", help="Note this as the commit where there is no checkout.")
@click.option("--alone", type=PATH, hidden=True)
def main(name: str, listed: bool, tune: bool, as_json: bool, work: Path | None, **given: Any) -> None:
    """Measure, and keep a record."""
    try:
        if given["quick"] and given["output"] is None:
            raise ConfigError("--quick needs --output FOLDER: its few samples do not belong into the kept record")
        if (tune or given["rehearse"]) and name != "gpu":
            raise ConfigError(f"--{'tune' if tune else 'rehearse'} belongs to --suite gpu, not to {name}")
        if given["rehearse"]:
            os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
        with tempfile.TemporaryDirectory(prefix="onetrans-bench-", ignore_cleanup_errors=True) as folder:
            raise SystemExit(_run(name, listed, tune, as_json, (work or Path(folder)).resolve(), given))
    except OneTransError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_status) from None


def _run(name: str, listed: bool, tune: bool, as_json: bool, work: Path, given: dict[str, Any]) -> int:
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(work / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(work / "triton"))
    from benchmarks.context import RESULTS, ROOT, Context, measure_key
    from benchmarks.suites import suite_of
    from onetrans.bench.runner import Options, Runner, chosen

    on_gpu = name == "gpu" and not given["rehearse"]
    if on_gpu and not listed:
        from benchmarks.cases.device import check_device

        check_device()
    artefacts, output = given.pop("artefacts"), given.pop("output")
    suite, options = suite_of(name), Options(output=output or RESULTS, root=ROOT, log=output is not None, **given)
    if listed:
        for measure in chosen(options.only, suite.measures):
            click.echo(f"{measure.name:45} about {measure.seconds:.0f} s")
        return 0
    context = Context(work=work, device="cuda" if on_gpu else "cpu", rehearse=options.rehearse, artefacts=artefacts)
    context.threads, context.quick = options.threads, options.quick
    key_of = functools.partial(measure_key, suite, options)
    context.source = key_of(next(iter(suite.measures.values())))["source_sha256"][:12]
    if name == "gpu":
        from benchmarks.tuning import Tuner, use_table

        with use_table(options, write=tune):
            status = Tuner(options).run() if tune else Runner(suite, options, context, key_of).run()
    else:
        status = Runner(suite, options, context, key_of).run()
    record = options.output / f"{name}.json"
    if as_json and record.exists() and not options.rehearse:
        print(json.dumps(json.loads(record.read_text(encoding="utf-8"))))
    return status


if __name__ == "__main__":
    main()
