"""What stands before every GPU figure: the kernels' tests, and what the device gives at best."""

from __future__ import annotations

import functools
import importlib.util
import re
import time

import torch

from benchmarks.contestants.kernels import CANDIDATES, FFN, HISTORY, LINEAR, OPS
from benchmarks.context import ROOT, Context
from onetrans.bench.processes import last_line
from onetrans.bench.rates import Rates
from onetrans.bench.stats import Estimate
from onetrans.bench.suite import Outcome, Row, estimated
from onetrans.bench.tests import COUNTED, run_pytest
from onetrans.bench.timing import Run, clear, microseconds, typical
from onetrans.errors import MissingDependencyError
from onetrans.precision import precision

TESTS = ROOT / "parity_tests"
TEST_FILES = "test_triton_*.py"
CONCERNS = {"test_triton_attention": (HISTORY, CANDIDATES), "test_triton_linear": (LINEAR, FFN)}  # by file
PROGRAMS = "programs"  # what a failing test of whole programs concerns
PROGRAM_TESTS = ("test_triton_target", "test_triton_captures")

COPY_BYTES = 4 << 30
SIDE = 8192
NODES = 200  # of the graph of empty kernels
DTYPES = ("bfloat16", "float16")


def run_tests(context: Context) -> Outcome:
    """The kernels' tests.

    `facts["concerns"]` lists what each failing test concerns, as (op or `programs`, dtype, test), either of
    the first empty for all. When time is up the tests are ended, and nothing is known to be right.
    """
    outcome, seconds = Outcome(), context.left()
    files = sorted(str(path.relative_to(ROOT)) for path in TESTS.glob(TEST_FILES))
    context.progress(" ".join(files))
    began = time.perf_counter()
    status, text, counts, failures = run_pytest(files, seconds, ROOT)
    context.progress("\n".join(text.splitlines()[-60:]))
    for name in COUNTED:
        outcome.figure(f"GPU tests that {name}", counts[name], target=0 if name == "failed" else None)
    outcome.figure("GPU tests, seconds", time.perf_counter() - began, "s")
    outcome.notes = [f"{name}: {message}" for name, message in failures[:40]]
    if status is None:
        outcome.failed = f"the tests did not end within {seconds:.0f} s; run again, or with a larger --budget"
    elif status or not counts["passed"]:
        outcome.failed = f"pytest exited with {status}: {outcome.notes[0] if failures else last_line(text)}"
    if outcome.failed:  # pytest exits with 1 where tests failed, with others where it broke off
        known = status == 1 and failures
        outcome.facts["concerns"] = [concern(name) for name, _ in failures] if known else [("", "", "the tests")]
    return outcome


def concern(test: str) -> tuple[str, str, str]:
    """Op and dtype that a failing test concerns, each empty for all; and its name."""
    dtype = re.search(r"torch\.(bfloat16|float16)", test)
    file = test.partition("::")[0].rpartition(".")[2]
    ops = [op for op in OPS if op in test.partition("::")[2]] or list(CONCERNS.get(file, ()))
    part = PROGRAMS if file in PROGRAM_TESTS else " ".join(ops)
    return part, dtype[1] if dtype else "", test


def ceilings(context: Context) -> Outcome:
    """A device-to-device copy, an 8192³ product on random data in both dtypes, and a graph of one-element kernels."""
    size, side, nodes = (1 << 16, 64, 4) if context.rehearse else (COPY_BYTES, SIDE, NODES)
    device, outcome = context.device, Outcome()
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    goal = torch.empty_like(source)
    runs: dict[str, Run] = {"copy": context.timer.plain(lambda: goal.copy_(source))}
    for dtype in DTYPES:
        a, b = (torch.randn(side, side, device=device).to(precision(dtype).torch) for _ in range(2))
        runs[dtype] = context.timer.plain(functools.partial(torch.mm, a, b, out=torch.empty_like(a)))
    one = torch.zeros(1, device=device)
    runs["launch"] = context.timer.graph([functools.partial(one.add_, 1.0)] * nodes)
    blocks = context.timer.blocks(runs)
    times = {name: typical(samples) for name, samples in blocks.items()}
    flops = 2 * side**3
    rows = [("device-to-device copy, bytes read and written", "TB/s", 2 * size / 1e12, times["copy"])]
    rows += [(f"{dtype} product of {side}³, random data", "TFLOP/s", flops / 1e12, times[dtype]) for dtype in DTYPES]
    outcome.rows = [_rate(*row) for row in rows]
    outcome.rows.append(estimated(times["launch"], "one-element kernel in a graph", "µs", scale=1e6))
    matmul = {dtype: flops / times[dtype].value for dtype in DTYPES}
    context.rates = Rates(copy=2 * size / times["copy"].value, matmul=matmul, launch=times["launch"].value)
    outcome.facts["rates"] = vars(context.rates)
    outcome.samples = dict(microseconds(blocks))
    clear()
    return outcome


def _rate(name: str, unit: str, amount: float, time: Estimate) -> Row:
    """Amount over time; the interval's ends change places."""
    return Row(name=name, unit=unit, value=amount / time.value, low=amount / time.high, high=amount / time.low)


def check_device() -> None:
    """Sees that a GPU and everything else is there."""
    for package in ("triton", "pytest"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(f"the GPU suite needs the package {package}, which is not installed")
    needed, hint = "the GPU suite needs a CUDA device", "or try the suite's code with --rehearse"
    if torch.version.cuda is None:
        built = f"torch {torch.__version__} is built without CUDA; install a CUDA build"
        raise MissingDependencyError(f"{needed}, and {built}, {hint}")
    if not torch.cuda.is_available():
        raise MissingDependencyError(f"{needed}, and torch sees none; look at the driver (nvidia-smi), {hint}")
