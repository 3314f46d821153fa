"""The shapes at which kernels are measured, and random inputs of them as the lowered programs hold them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from benchmarks.gpu.measure import Sizes
from benchmarks.gpu.reckoning import Work, candidate_work, ffn_work, history_work, linear_work, windows

SLOTS, SLOT = 4, 2
EPS = 1e-6
ACTIVATION = "gelu"
CALL_BYTES = 64 << 20  # so much in all the calls of one graph
MOST_CALLS = 8


@dataclass(frozen=True, kw_only=True)
class HistoryCase:
    """history_attention of the last `queries` of a window."""

    name: str
    queries: int
    window: int
    heads: int
    width: int

    @property
    def work(self) -> Work:
        """Operations and bytes."""
        return history_work(queries=self.queries, window=self.window, heads=self.heads, width=self.width)


@dataclass(frozen=True, kw_only=True)
class CandidateCase:
    """candidate_attention over a window."""

    name: str
    candidates: int
    positions: int
    window: int
    heads: int
    width: int

    @property
    def work(self) -> Work:
        """Operations and bytes."""
        return candidate_work(
            candidates=self.candidates,
            positions=self.positions,
            window=self.window,
            heads=self.heads,
            width=self.width,
        )


@dataclass(frozen=True, kw_only=True)
class LinearCase:
    """mixed_linear."""

    name: str
    positions: int
    rows: int
    inner: int
    columns: int
    gain: bool = False
    residual: bool = False

    @property
    def work(self) -> Work:
        """Operations and bytes."""
        return linear_work(
            positions=self.positions,
            rows=self.rows,
            inner=self.inner,
            columns=self.columns,
            gain=self.gain,
            residual=self.residual,
        )


@dataclass(frozen=True, kw_only=True)
class FfnCase:
    """mixed_ffn."""

    name: str
    positions: int
    rows: int
    inner: int
    hidden: int

    @property
    def work(self) -> Work:
        """Operations and bytes."""
        return ffn_work(positions=self.positions, rows=self.rows, inner=self.inner, hidden=self.hidden)


Case = HistoryCase | CandidateCase | LinearCase | FfnCase
C = TypeVar("C", HistoryCase, CandidateCase, LinearCase, FfnCase)


def history_cases(sizes: Sizes) -> list[HistoryCase]:
    """Every layer's attention in a fresh prefill of a full history, and in an append."""
    config = sizes.config
    fresh, appended = windows(config, sizes.history), windows(config, sizes.before + sizes.new)
    shared = {"heads": config.heads, "width": config.head_dim}
    found = []
    for layer in range(config.layers - 1):
        Nq, N = fresh[layer + 1], fresh[layer]
        found.append(HistoryCase(name=f"prefill, layer {layer}: {Nq} of {N}", queries=Nq, window=N, **shared))
    for layer in range(config.layers - 1):
        N = appended[layer]
        name = f"append, layer {layer}: {sizes.new} of {N}"
        found.append(HistoryCase(name=name, queries=sizes.new, window=N, **shared))
    return distinct(found)


def candidate_cases(sizes: Sizes) -> list[CandidateCase]:
    """Every layer's attention in decodes of few and many candidates."""
    config = sizes.config
    return distinct(
        [
            CandidateCase(
                name=f"C = {C}, layer {layer}: window {N}",
                candidates=C,
                positions=config.l_ns,
                window=N,
                heads=config.heads,
                width=config.head_dim,
            )
            for C in sizes.candidates
            for layer, N in enumerate(windows(config, sizes.history))
        ]
    )


def linear_cases(sizes: Sizes) -> list[LinearCase]:
    """The projections of decode, prefill and append."""
    config = sizes.config
    d, P = config.d, config.l_ns
    found = []
    for C in sizes.candidates:
        shared = {"positions": P, "rows": C, "inner": d}
        found.append(LinearCase(name=f"decode, C = {C}: QKV", columns=3 * d, gain=True, **shared))
        found.append(LinearCase(name=f"decode, C = {C}: output", columns=d, residual=True, **shared))
    for what, rows in _shared_rows(sizes):
        shared = {"positions": 1, "rows": rows, "inner": d}
        found.append(LinearCase(name=f"{what}, {rows} rows: KV", columns=2 * d, gain=True, **shared))
        found.append(LinearCase(name=f"{what}, {rows} rows: Q", columns=d, gain=True, **shared))
        found.append(LinearCase(name=f"{what}, {rows} rows: output", columns=d, residual=True, **shared))
    return distinct(found)


def ffn_cases(sizes: Sizes) -> list[FfnCase]:
    """The feed-forwards of decode, prefill and append."""
    config = sizes.config
    shared = {"inner": config.d, "hidden": config.ffn_ratio * config.d}
    decode = [FfnCase(name=f"decode, C = {C}", positions=config.l_ns, rows=C, **shared) for C in sizes.candidates]
    others = [FfnCase(name=f"{what}, {n} rows", positions=1, rows=n, **shared) for what, n in _shared_rows(sizes)]
    return distinct(decode + others)


def _shared_rows(sizes: Sizes) -> Iterator[tuple[str, int]]:
    yield from (("prefill", rows) for rows in dict.fromkeys(windows(sizes.config, sizes.history)))
    yield "append", sizes.new


def distinct(cases: list[C]) -> list[C]:
    """The first case of each shape."""
    found: dict[object, C] = {}
    for case in cases:
        found.setdefault(tuple(value for name, value in vars(case).items() if name != "name"), case)
    return list(found.values())


def calls_of(work: Work) -> int:
    """How many calls, on inputs of their own, one graph holds."""
    return max(1, min(MOST_CALLS, CALL_BYTES // work.bytes))


class Draw:
    """Random numbers that follow from a case's name and the number of the draw."""

    def __init__(self, name: str, index: int, device: torch.device, dtype: torch.dtype) -> None:
        self._generator = torch.Generator(device=device).manual_seed(zlib.crc32(f"{name} {index}".encode()))
        self.device, self.dtype = device, dtype

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers times `scale`."""
        drawn = torch.randn(shape, generator=self._generator, device=self.device, dtype=torch.float32)
        return (drawn * scale).to(self.dtype)

    def whole(self, *values: int) -> torch.Tensor:
        """int64."""
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def slab(self, length: int, heads: int, width: int) -> torch.Tensor:
        """A pool of states: `length` tokens in slot SLOT, NaN everywhere else."""
        made = torch.full((SLOTS, length + 3, heads, width), float("nan"), dtype=self.dtype, device=self.device)
        made[SLOT, :length] = self.normal(length, heads, width)
        return made


@dataclass(frozen=True, kw_only=True)
class HistoryInputs:
    """Of history_attention; K and V in slabs."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_start: torch.Tensor
    length: torch.Tensor
    slots: torch.Tensor
    tokens: int

    @property
    def window(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the user's tokens alone [1, N, H, E], as views."""
        return self.k[SLOT : SLOT + 1, : self.tokens], self.v[SLOT : SLOT + 1, : self.tokens]


@dataclass(frozen=True, kw_only=True)
class CandidateInputs:
    """Of candidate_attention; q, k and v are parts of one product's rows, K and V of the window in slabs."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    length: torch.Tensor
    slots: torch.Tensor
    tokens: int

    @property
    def window(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Likewise."""
        return self.keys[SLOT : SLOT + 1, : self.tokens], self.values[SLOT : SLOT + 1, : self.tokens]


@dataclass(frozen=True, kw_only=True)
class DenseInputs:
    """Of mixed_linear and mixed_ffn, in the order of the references' arguments."""

    arguments: tuple[object, ...]


Inputs = HistoryInputs | CandidateInputs | DenseInputs


def draw(case: Case, index: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Inputs number `index` of a case."""
    made = Draw(case.name, index, device, dtype)
    if isinstance(case, HistoryCase):
        H, E, N = case.heads, case.width, case.window
        return HistoryInputs(
            q=made.normal(1, case.queries, H, E, scale=E**-0.5),
            k=made.slab(N, H, E),
            v=made.slab(N, H, E),
            q_start=made.whole(N - case.queries),
            length=made.whole(N),
            slots=made.whole(SLOT),
            tokens=N,
        )
    if isinstance(case, CandidateCase):
        H, E, N = case.heads, case.width, case.window
        rows = made.normal(case.positions, case.candidates, 3 * H * E)
        rows[..., : H * E] *= E**-0.5
        q, k, v = rows.chunk(3, dim=-1)
        return CandidateInputs(
            q=q,
            k=k,
            v=v,
            keys=made.slab(N, H, E),
            values=made.slab(N, H, E),
            length=made.whole(N),
            slots=made.whole(SLOT),
            tokens=N,
        )
    P, B, D = case.positions, case.rows, case.inner
    x, gain = made.normal(P, B, D), 1 + made.normal(D, scale=0.1)
    if isinstance(case, LinearCase):
        w = made.normal(P, D, case.columns, scale=D**-0.5)
        residual = made.normal(P, B, case.columns) if case.residual else None
        return DenseInputs(arguments=(x, w, gain if case.gain else None, EPS, None, residual))
    up, down = made.normal(P, D, case.hidden, scale=D**-0.5), made.normal(P, case.hidden, D, scale=case.hidden**-0.5)
    return DenseInputs(arguments=(x, up, down, gain, EPS, ACTIVATION, False))
