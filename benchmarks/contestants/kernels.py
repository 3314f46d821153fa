"""Providers of what a semantic op computes: our kernel, the reference in PyTorch, and the libraries' attentions.

A provider prepares inputs in the layout that suits it best (not timed), runs (timed), and lays its result out as the
reference does (not timed).
"""

from __future__ import annotations

import functools
import importlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from onetrans import kernels
from onetrans.bench.competition import OURS
from onetrans.bench.rates import Work, candidate_work, ffn_work, history_work, linear_work

SLOTS, SLOT = 4, 2
EPS = 1e-6
ACTIVATION = "gelu"
SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
EXPANDING = "expand + "
ALONE = "bmm alone"
HISTORY, CANDIDATES, LINEAR, FFN = "history_attention", "candidate_attention", "mixed_linear", "mixed_ffn"
OPS = (LINEAR, HISTORY, CANDIDATES, FFN)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of an op: products of P positions, rows [B, D] @ [D, F]; attention of H heads of E over N tokens."""

    op: str
    name: str
    P: int = 1  # positions with weights of their own
    rows: int  # queries, candidates, or rows of a product
    D: int = 0
    F: int = 0  # columns of a product; hidden columns of a feed-forward
    N: int = 0
    H: int = 0
    E: int = 0
    gain: bool = False  # whether a product normalises its rows
    residual: bool = False

    @property
    def work(self) -> Work:
        """Operations and bytes."""
        rows, P = self.rows, self.P
        if self.op == HISTORY:
            return history_work(queries=rows, window=self.N, heads=self.H, width=self.E)
        if self.op == CANDIDATES:
            return candidate_work(candidates=rows, positions=P, window=self.N, heads=self.H, width=self.E)
        if self.op == FFN:
            return ffn_work(positions=P, rows=rows, inner=self.D, hidden=self.F)
        options = {"gain": self.gain, "residual": self.residual}
        return linear_work(positions=P, rows=rows, inner=self.D, columns=self.F, **options)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Random inputs of a case."""

    arguments: list[Any]  # the reference's, K and V of a window cut to the user's tokens, as views of the slabs
    own: list[Any]  # our kernel's, K and V in slabs that are NaN but for those tokens
    slots: Mapping[str, torch.Tensor] = field(default_factory=dict)  # the user's, where there are slabs
    shape: tuple[int, ...]  # the result's
    rounding: torch.Tensor | None = None  # what a kernel sums after rounding weights to the dtype (see `compare`)

    def empty(self) -> torch.Tensor:
        """Memory for the result, uninitialised."""
        return self.own[0].new_empty(self.shape)  # type: ignore[no-any-return]


def draw(case: Case, index: int, device: torch.device | str, dtype: torch.dtype) -> Inputs:
    """Inputs number `index` of a case; the numbers follow from its name and the index."""
    generator = torch.Generator(device=device).manual_seed(zlib.crc32(f"{case.name} {index}".encode()))
    P, B, D, N, H, E = case.P, case.rows, case.D, case.N, case.H, case.E

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    def whole(value: int) -> torch.Tensor:
        return torch.tensor([value], device=device)

    def slab() -> torch.Tensor:
        made = torch.full((SLOTS, N + 3, H, E), float("nan"), dtype=dtype, device=device)
        made[SLOT, :N] = normal(N, H, E)
        return made

    def cut(slab: torch.Tensor) -> torch.Tensor:
        return slab[SLOT : SLOT + 1, :N]

    if case.op == HISTORY:
        q, k, v = normal(1, B, H, E, scale=E**-0.5), slab(), slab()
        places = [whole(N - B), whole(N)]
        return Inputs(
            arguments=[q, cut(k), cut(v), *places],
            own=[q, k, v, *places],
            slots={"slots": whole(SLOT)},
            shape=tuple(q.shape),
            rounding=cut(v).flatten(),
        )
    if case.op == CANDIDATES:
        rows = normal(P, B, 3 * H * E)  # one product's, whose parts are q, k and v
        rows[..., : H * E] *= E**-0.5
        q, k, v = rows.chunk(3, dim=-1)
        keys, values, length = slab(), slab(), whole(N)
        return Inputs(
            arguments=[q, k, v, [cut(keys)], [cut(values)], [length]],
            own=[q, k, v, [keys], [values], [length]],
            slots={"slots": whole(SLOT)},
            shape=tuple(q.shape),
            rounding=torch.cat([cut(values).flatten(), v.flatten()]),
        )
    x, gain = normal(P, B, D), 1 + normal(D, scale=0.1)
    if case.op == LINEAR:
        w = normal(P, D, case.F, scale=D**-0.5)
        residual = normal(P, B, case.F) if case.residual else None
        arguments: list[Any] = [x, w, gain if case.gain else None, EPS, None, residual]
        return Inputs(arguments=arguments, own=arguments, shape=(P, B, case.F))
    up, down = normal(P, D, case.F, scale=D**-0.5), normal(P, case.F, D, scale=case.F**-0.5)
    arguments = [x, up, down, gain, EPS, ACTIVATION, False]
    return Inputs(arguments=arguments, own=arguments, shape=(P, B, D))


def reference(case: Case, inputs: Inputs, *, double: bool = False) -> torch.Tensor:
    """The op's public reference, in float64 or in the inputs' dtype."""

    def wide(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x.double() if double and x.is_floating_point() else x
        return [wide(part) for part in x] if isinstance(x, list) else x

    made: torch.Tensor = _function(case)(*wide(inputs.arguments))
    return made


def _function(case: Case) -> Any:
    return getattr(kernels, f"{case.op}_reference")


def launch(case: Case, inputs: Inputs, out: torch.Tensor | None = None) -> torch.Tensor:
    """Fills `out`, or fresh memory, by our kernel; `onetrans.kernels.launch.table.forced` sets its configuration."""
    out = inputs.empty() if out is None else out
    importlib.import_module(f"onetrans.kernels.{case.op}.kernel").launch(out, *inputs.own, **inputs.slots)
    return out


def _as_it_is(x: Any) -> Any:
    return x


@dataclass(frozen=True, kw_only=True)
class Provider:
    """See the module."""

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[Inputs], Any] = _as_it_is
    finish: Callable[[Any], torch.Tensor] = _as_it_is


def ours_and_eager(case: Case) -> list[Provider]:
    """Our kernel, as the lowered programs call it, and the reference as plain PyTorch runs it, products by cuBLAS."""
    ours, eager = functools.partial(launch, case), functools.partial(reference, case)
    return [Provider(name=OURS, run=ours), Provider(name="eager", run=eager)]


def product_alone() -> Provider:
    """cuBLAS's product without norm and residual."""
    return Provider(name=ALONE, run=lambda inputs: torch.bmm(*inputs.arguments[:2]))


def compiled(case: Case, compile_function: Callable[[Any], Any]) -> Provider:
    """The reference by torch.compile."""
    made = compile_function(_function(case))
    return Provider(name="torch.compile", prepare=lambda x: x.arguments, run=lambda arguments: made(*arguments))


def sdpa(case: Case, backends: Mapping[str, SDPBackend]) -> list[Provider]:
    """Every backend of SDPA; candidates over K and V expanded for each of them, beforehand or as part of it."""
    make = _history_sdpa if case.op == HISTORY else _candidate_sdpa
    return [provider for name, backend in backends.items() for provider in make(case, name, backend)]


def _mask(backend: SDPBackend, queries: int, keys: int, like: torch.Tensor) -> dict[str, Any]:
    """Lower-right causality as the backend takes it; is_causal is upper-left there."""
    if queries == keys:
        return {"is_causal": True}
    if backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        return {"attn_mask": causal_lower_right(queries, keys)}
    seen = torch.ones(queries, keys, dtype=torch.bool, device=like.device).tril(keys - queries)
    # added to the scores: SDPA would turn a mask of booleans into this in every call, and that would be timed
    return {"attn_mask": torch.zeros_like(seen, dtype=like.dtype).masked_fill(~seen, torch.finfo(like.dtype).min)}


def _attend(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, scale=1.0, **mask)


def _with_mask(backend: SDPBackend, given: Any) -> torch.Tensor:
    return _attend(backend, *given)


def _turned(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2)


def _history_sdpa(case: Case, name: str, backend: SDPBackend) -> list[Provider]:
    def prepare(inputs: Inputs) -> Any:
        q, k, v = (_turned(x) for x in inputs.arguments[:3])
        return q, k, v, _mask(backend, case.rows, case.N, q)

    return [Provider(name=name, prepare=prepare, run=functools.partial(_with_mask, backend), finish=_turned)]


def _by_candidate(case: Case, inputs: Inputs) -> list[torch.Tensor]:
    """q, k and v [P, C, H·E], each as [C, P, H, E]."""
    return [x.unflatten(2, (case.H, case.E)).transpose(0, 1) for x in inputs.arguments[:3]]


def _candidate_sdpa(case: Case, name: str, backend: SDPBackend) -> list[Provider]:
    C, P, N = case.rows, case.P, case.N

    def parts(inputs: Inputs) -> Any:
        q, k, v = _by_candidate(case, inputs)
        return _turned(q), (inputs.arguments[3][0], inputs.arguments[4][0]), (k, v), _mask(backend, P, N + P, q)

    def expand(windows: Any, own: Any) -> list[torch.Tensor]:
        joined = [torch.cat([w.expand(C, -1, -1, -1), o], dim=1) for w, o in zip(windows, own, strict=True)]
        return [_turned(x) for x in joined]

    def prepare(inputs: Inputs) -> Any:
        q, windows, own, mask = parts(inputs)
        return q, *expand(windows, own), mask

    def both(given: Any) -> torch.Tensor:
        q, windows, own, mask = given
        return _with_mask(backend, (q, *expand(windows, own), mask))

    def finish(out: torch.Tensor) -> torch.Tensor:
        return out.permute(2, 0, 1, 3).flatten(2)

    return [
        Provider(name=name, prepare=prepare, run=functools.partial(_with_mask, backend), finish=finish),
        Provider(name=EXPANDING + name, prepare=parts, run=both, finish=finish),
    ]


def flex(case: Case, compile_function: Callable[[Any], Any]) -> Provider:
    """FlexAttention with a block mask; candidates packed against one K and V, own blocks beside the window."""
    attend = compile_function(flex_attention)

    def run(given: Any) -> torch.Tensor:
        q, k, v, mask = given
        made: torch.Tensor = attend(q, k, v, block_mask=mask, scale=1.0)
        return made

    prepare, finish = (_history_flex if case.op == HISTORY else _candidate_flex)(case)
    return Provider(name="flex", prepare=prepare, run=run, finish=finish)


def _history_flex(case: Case) -> tuple[Callable[[Inputs], Any], Callable[[Any], torch.Tensor]]:
    def prepare(inputs: Inputs) -> Any:
        q, k, v = (_turned(x) for x in inputs.arguments[:3])
        offset = inputs.arguments[3][0].clone()

        def seen(b: Any, h: Any, query: Any, key: Any) -> Any:
            return key <= query + offset

        return q, k, v, create_block_mask(seen, None, None, case.rows, case.N, device=q.device)

    return prepare, _turned


def _candidate_flex(case: Case) -> tuple[Callable[[Inputs], Any], Callable[[Any], torch.Tensor]]:
    C, P, N = case.rows, case.P, case.N

    def seen(b: Any, h: Any, query: Any, key: Any) -> Any:
        own = key - N
        mine = (own // P == query // P) & (own % P <= query % P)
        return (key < N) | ((own >= 0) & mine)

    def prepare(inputs: Inputs) -> Any:
        q, k, v = (x.flatten(0, 1)[None] for x in _by_candidate(case, inputs))
        windows = inputs.arguments[3][0], inputs.arguments[4][0]
        key, value = (torch.cat([w, o], dim=1) for w, o in zip(windows, (k, v), strict=True))
        mask = create_block_mask(seen, None, None, C * P, N + C * P, device=q.device)
        return *map(_turned, (q, key, value)), mask

    return prepare, lambda out: out[0].transpose(0, 1).unflatten(0, (C, P)).transpose(0, 1).flatten(2)
