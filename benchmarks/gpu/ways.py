"""Ways to compute what a semantic op computes: our kernel, the reference in PyTorch, and the libraries' attentions.

A way prepares inputs in the layout that suits it best (not timed), runs (timed), and lays its result out as the
reference does (not timed).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.gpu.cases import (
    CandidateCase,
    CandidateInputs,
    Case,
    DenseInputs,
    HistoryCase,
    HistoryInputs,
    LinearCase,
)
from benchmarks.gpu.measure import OURS
from onetrans.kernels import (
    candidate_attention_reference,
    history_attention_reference,
    mixed_ffn_reference,
    mixed_linear_reference,
)
from onetrans.kernels.launch import LaunchConfig

SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
EXPANDING = "expand + "


def _as_it_is(x: Any) -> Any:
    return x


@dataclass(frozen=True, kw_only=True)
class Way:
    """See the module."""

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[Any], Any] = _as_it_is
    finish: Callable[[Any], torch.Tensor] = _as_it_is


def reference(case: Case, inputs: Any, *, double: bool = False) -> torch.Tensor:
    """The op's public reference, in float64 or in the inputs' dtype."""

    def wide(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x.double() if double and x.is_floating_point() else x
        return [wide(part) for part in x] if isinstance(x, list | tuple) else x

    return _REFERENCES[type(inputs)](case, wide(_arguments(inputs)))


def _arguments(inputs: Any) -> list[Any]:
    if isinstance(inputs, HistoryInputs):
        return [inputs.q, *inputs.window, inputs.q_start, inputs.length]
    if isinstance(inputs, CandidateInputs):
        key, value = inputs.window
        return [inputs.q, inputs.k, inputs.v, [key], [value], [inputs.length]]
    return list(inputs.arguments)


def _dense(case: Case, arguments: Any) -> torch.Tensor:
    function = mixed_linear_reference if isinstance(case, LinearCase) else mixed_ffn_reference
    return function(*arguments)


_REFERENCES: dict[type, Callable[[Case, Any], torch.Tensor]] = {
    HistoryInputs: lambda _, arguments: history_attention_reference(*arguments),
    CandidateInputs: lambda _, arguments: candidate_attention_reference(*arguments),
    DenseInputs: _dense,
}


def rounding(case: Case, inputs: Any) -> torch.Tensor | None:
    """What a kernel sums after rounding weights to the dtype (see `parity.compare`): values, in attention."""
    if isinstance(inputs, HistoryInputs):
        return inputs.window[1].flatten()
    if isinstance(inputs, CandidateInputs):
        return torch.cat([inputs.window[1].flatten(), inputs.v.flatten()])
    return None


def empty_result(case: Case, inputs: Any) -> torch.Tensor:
    """Memory for the op's result, uninitialised."""
    if not isinstance(inputs, DenseInputs):
        return torch.empty(inputs.q.shape, dtype=inputs.q.dtype, device=inputs.q.device)
    x: Any = inputs.arguments[0]
    return x.new_empty((*x.shape[:2], case.columns if isinstance(case, LinearCase) else x.shape[2]))


def launch_ours(case: Case, inputs: Any, out: torch.Tensor, config: LaunchConfig | None = None) -> torch.Tensor:
    """Fills `out` by our kernel.

    Args:
        case: What to compute.
        inputs: Of it.
        out: Of the shape of `empty_result`.
        config: Of mixed_linear and mixed_ffn; attention takes `onetrans.kernels.launch.table.forced`.
    """
    if isinstance(inputs, HistoryInputs):
        from onetrans.kernels.history_attention import kernel as history

        history.launch(out, inputs.q, inputs.k, inputs.v, inputs.q_start, inputs.length, slots=inputs.slots)
    elif isinstance(inputs, CandidateInputs):
        from onetrans.kernels.candidate_attention import kernel as candidates

        i = inputs
        candidates.launch(out, i.q, i.k, i.v, [i.keys], [i.values], [i.length], slots=i.slots)
    elif isinstance(case, LinearCase):
        from onetrans.kernels.mixed_linear import kernel as linear

        linear.launch(out, *inputs.arguments, config=config)
    else:
        from onetrans.kernels.mixed_ffn import kernel as ffn

        ffn.launch(out, *inputs.arguments, config=config)
    return out


def ours(case: Case) -> Way:
    """Our kernel, as the lowered programs call it."""
    return Way(name=OURS, run=lambda inputs: launch_ours(case, inputs, empty_result(case, inputs)))


def eager(case: Case) -> Way:
    """The reference as plain PyTorch runs it; products by cuBLAS, norm, bias and residual apart."""
    return Way(name="eager", run=functools.partial(reference, case))


def product_alone(case: LinearCase) -> Way:
    """cuBLAS's product without norm and residual."""
    return Way(name="bmm alone", run=lambda inputs: torch.bmm(inputs.arguments[0], inputs.arguments[1]))


def compiled(case: Case, compile_function: Callable[[Any], Any]) -> Way:
    """The reference by torch.compile."""
    function: Any = {
        HistoryCase: history_attention_reference,
        CandidateCase: candidate_attention_reference,
        LinearCase: mixed_linear_reference,
    }.get(type(case), mixed_ffn_reference)
    made = compile_function(function)
    return Way(name="torch.compile", prepare=_arguments, run=lambda arguments: made(*arguments))


def sdpa(case: HistoryCase | CandidateCase, backends: dict[str, SDPBackend]) -> list[Way]:
    """Every backend of SDPA; candidates over K and V expanded for each of them, beforehand or as part of it."""
    ways = []
    for name, backend in backends.items():
        if isinstance(case, HistoryCase):
            ways.append(_history_sdpa(case, name, backend))
        else:
            ways += _candidate_sdpa(case, name, backend)
    return ways


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


def _history_sdpa(case: HistoryCase, name: str, backend: SDPBackend) -> Way:
    def prepare(inputs: HistoryInputs) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, *inputs.window))
        return q, k, v, _mask(backend, case.queries, case.window, q)

    return Way(
        name=name,
        prepare=prepare,
        run=lambda given: _attend(backend, *given),
        finish=lambda out: out.transpose(1, 2),
    )


def _by_candidate(case: CandidateCase, x: torch.Tensor) -> torch.Tensor:
    """x [P, C, H·E] as [C, P, H, E]."""
    return x.unflatten(2, (case.heads, case.width)).transpose(0, 1)


def _candidate_sdpa(case: CandidateCase, name: str, backend: SDPBackend) -> list[Way]:
    C, P, N = case.candidates, case.positions, case.window

    def parts(inputs: CandidateInputs) -> Any:
        q, k, v = (_by_candidate(case, x) for x in (inputs.q, inputs.k, inputs.v))
        return q.transpose(1, 2), inputs.window, (k, v), _mask(backend, P, N + P, q)

    def expand(windows: Any, own: Any) -> list[torch.Tensor]:
        joined = [torch.cat([w.expand(C, -1, -1, -1), o], dim=1) for w, o in zip(windows, own, strict=True)]
        return [x.transpose(1, 2) for x in joined]

    def prepare(inputs: CandidateInputs) -> Any:
        q, windows, own, mask = parts(inputs)
        return q, *expand(windows, own), mask

    def finish(out: torch.Tensor) -> torch.Tensor:
        return out.permute(2, 0, 1, 3).flatten(2)

    def both(given: Any) -> torch.Tensor:
        q, windows, own, mask = given
        return _attend(backend, q, *expand(windows, own), mask)

    return [
        Way(name=name, prepare=prepare, run=lambda given: _attend(backend, *given), finish=finish),
        Way(name=EXPANDING + name, prepare=parts, run=both, finish=finish),
    ]


def flex(case: HistoryCase | CandidateCase, compile_function: Callable[[Any], Any]) -> Way:
    """FlexAttention with a block mask; candidates packed against one K and V, own blocks beside the window."""
    attend = compile_function(flex_attention)
    if isinstance(case, HistoryCase):
        return _history_flex(case, attend)
    return _candidate_flex(case, attend)


def _history_flex(case: HistoryCase, attend: Any) -> Way:
    def prepare(inputs: HistoryInputs) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, *inputs.window))
        offset = inputs.q_start[0].clone()

        def seen(b: Any, h: Any, query: Any, key: Any) -> Any:
            return key <= query + offset

        return q, k, v, create_block_mask(seen, None, None, case.queries, case.window, device=q.device)

    return Way(
        name="flex", prepare=prepare, run=functools.partial(_flex, attend), finish=lambda out: out.transpose(1, 2)
    )


def _candidate_flex(case: CandidateCase, attend: Any) -> Way:
    C, P, N = case.candidates, case.positions, case.window

    def seen(b: Any, h: Any, query: Any, key: Any) -> Any:
        own = key - N
        mine = (own // P == query // P) & (own % P <= query % P)
        return (key < N) | ((own >= 0) & mine)

    def prepare(inputs: CandidateInputs) -> Any:
        q, k, v = (_by_candidate(case, x).flatten(0, 1)[None] for x in (inputs.q, inputs.k, inputs.v))
        key, value = (torch.cat([w, o], dim=1) for w, o in zip(inputs.window, (k, v), strict=True))
        mask = create_block_mask(seen, None, None, C * P, N + C * P, device=q.device)
        return *(x.transpose(1, 2) for x in (q, key, value)), mask

    def finish(out: torch.Tensor) -> torch.Tensor:
        return out[0].transpose(0, 1).unflatten(0, (C, P)).transpose(0, 1).flatten(2)

    return Way(name="flex", prepare=prepare, run=functools.partial(_flex, attend), finish=finish)


def _flex(attend: Any, given: Any) -> torch.Tensor:
    q, k, v, mask = given
    return attend(q, k, v, block_mask=mask, scale=1.0)
