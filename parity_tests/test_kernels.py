from __future__ import annotations

import importlib
import inspect
import math

import pytest
import torch

from onetrans.export.targets.onnx.graph import LOWERINGS
from onetrans.kernels import (
    candidate_attention_reference,
    history_attention_reference,
    mixed_ffn_reference,
    mixed_linear_reference,
    take_rows_reference,
)
from onetrans.kernels.candidate_attention import candidate_attention_op
from onetrans.kernels.history_attention import history_attention_op
from onetrans.kernels.mixed_ffn import mixed_ffn_op
from onetrans.kernels.mixed_linear import keys_into_state_op, mixed_linear_op
from onetrans.kernels.take_rows import take_rows_op
from parity_tests.triton_device import needs_triton

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(shape, dtype=DOUBLE)


def softmax_over(q, keys, values):
    """One query [E] over lists of keys and values [E]: the textbook sum, in Python floats."""
    scores = [float(q @ k) for k in keys]
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


@pytest.mark.parametrize(
    ("lengths", "queries"),
    [([0], 1), ([1], 1), ([5, 3], 2), ([9, 0, 1, 7], 4), ([63], 12)],
    ids=["empty", "one", "two-users", "ragged", "63"],
)
@pytest.mark.parametrize("past_lengths", [None, [0, 3, 5, 1]], ids=["fresh", "append"])
def test_history_attention_is_lower_right_causal_over_valid_tokens(lengths, queries, past_lengths):
    U, H, E = len(lengths), 2, 3
    N = max(1, *lengths)
    q, k, v = randn(U, queries, H, E), randn(U, N, H, E), randn(U, N, H, E)
    q_start = torch.tensor([max(0, n - queries) for n in lengths])
    past = ()
    if past_lengths is not None:
        W = 6
        past_length = torch.tensor(past_lengths[:U])
        past_k, past_v = randn(U, W, H, E), randn(U, W, H, E)
        for u in range(U):  # what lies beyond the valid tokens must not matter
            past_k[u, past_lengths[u] :] = float("nan")
            past_v[u, past_lengths[u] :] = float("nan")
        past = (past_k, past_v, past_length)
    out = history_attention_reference(q, k, v, q_start, torch.tensor(lengths), *past)
    for u, n in enumerate(lengths):
        for i in range(min(queries, n)):
            last = int(q_start[u]) + i
            if last >= n:
                continue
            for h in range(H):
                keys, values = list(k[u, : last + 1, h]), list(v[u, : last + 1, h])
                if past:
                    keys += list(past[0][u, : past_lengths[u], h])
                    values += list(past[1][u, : past_lengths[u], h])
                torch.testing.assert_close(out[u, i, h], softmax_over(q[u, i, h], keys, values), rtol=1e-12, atol=1e-13)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(("U", "C", "P"), [(1, 1, 1), (1, 7, 4), (3, 2, 5)])
@pytest.mark.parametrize("segments", [[[4, 0, 2]], [[2, 2, 2], [3, 1, 0]]], ids=["one-segment", "two-segments"])
def test_candidate_attention_sees_the_users_valid_tokens_and_its_own_causal_block(U, C, P, segments):
    H, E, W = 2, 3, 5
    q, k, v = (randn(P, U * C, H * E) for _ in range(3))
    lengths = [torch.tensor(segment[:U]) for segment in segments]
    keys, values = ([randn(U, W, H, E) for _ in segments] for _ in range(2))
    for length, key, value in zip(lengths, keys, values, strict=True):
        for u in range(U):
            key[u, int(length[u]) :] = float("nan")
            value[u, int(length[u]) :] = float("nan")
    out = candidate_attention_reference(q, k, v, keys, values, lengths)
    for b in range(U * C):
        u = b // C
        for p in range(P):
            for h in range(H):
                at = slice(h * E, (h + 1) * E)
                seen = [(k[j, b, at], v[j, b, at]) for j in range(p + 1)]
                for length, key, value in zip(lengths, keys, values, strict=True):
                    seen += [(key[u, j, h], value[u, j, h]) for j in range(int(length[u]))]
                expected = softmax_over(q[p, b, at], *zip(*seen, strict=True))
                torch.testing.assert_close(out[p, b, at], expected, rtol=1e-12, atol=1e-13)


def norm(x, gain, eps):
    return [
        float(v) * g / math.sqrt(sum(float(u) ** 2 for u in x) / len(x) + eps) for v, g in zip(x, gain, strict=True)
    ]


@pytest.mark.parametrize("per_position", [False, True], ids=["shared-gain", "gain-per-position"])
def test_mixed_linear_has_weights_of_its_own_per_position(per_position):
    P, B, D, F = 3, 4, 5, 6
    x, w, bias, residual = randn(P, B, D), randn(P, D, F), randn(P, F), randn(P, B, F)
    gain = randn(P, D) if per_position else randn(D)
    out = mixed_linear_reference(x, w, gain, 1e-3, bias, residual)
    for p in range(P):
        for b in range(B):
            row = torch.tensor(norm(x[p, b], gain[p] if per_position else gain, 1e-3), dtype=DOUBLE)
            expected = residual[p, b] + torch.stack([row @ w[p, :, f] for f in range(F)]) + bias[p]
            torch.testing.assert_close(out[p, b], expected, rtol=1e-12, atol=1e-12)


SCALARS = [
    ("gelu", lambda t: t * 0.5 * (1 + math.erf(t / math.sqrt(2)))),
    ("silu", lambda t: t / (1 + math.exp(-t))),
    ("relu", lambda t: max(t, 0.0)),
]


@pytest.mark.parametrize(("activation", "scalar"), SCALARS)
def test_mixed_linear_adds_its_residual_after_the_activation(activation, scalar):
    x, w, gain, bias, residual = randn(3, 4, 5), randn(3, 5, 6), randn(5), randn(3, 6), randn(3, 4, 6)
    bare = mixed_linear_reference(x, w, gain, 1e-3, bias)
    expected = residual + torch.tensor([scalar(float(t)) for t in bare.flatten()], dtype=DOUBLE).view_as(bare)
    out = mixed_linear_reference(x, w, gain, 1e-3, bias, residual, activation)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("activation", "scalar"), SCALARS)
def test_mixed_ffn_is_two_products_an_activation_and_a_residual(gated, activation, scalar):
    P, B, D, F = 2, 3, 4, 6
    x, gain = randn(P, B, D), randn(D)
    w1, w2 = randn(P, D, F * (2 if gated else 1)), randn(P, F, D)
    b1, b2 = randn(P, w1.shape[2]), randn(P, D)
    out = mixed_ffn_reference(x, w1, w2, gain, 1e-6, activation, gated, b1, b2)
    for p in range(P):
        for b in range(B):
            row = torch.tensor(norm(x[p, b], gain, 1e-6), dtype=DOUBLE)
            up = [float(t) for t in row @ w1[p] + b1[p]]
            hidden = [scalar(up[f]) * (up[F + f] if gated else 1.0) for f in range(F)]
            expected = x[p, b] + torch.tensor(hidden, dtype=DOUBLE) @ w2[p] + b2[p]
            torch.testing.assert_close(out[p, b], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [0, 1, 4, 9])
@pytest.mark.parametrize(
    ("starts", "N"), [([0], 1), ([3], 5), ([0, 4, 2], 5), ([5, 9, 1, 0, 3], 5)], ids=["one", "U1", "tail", "past-end"]
)
def test_take_rows_are_consecutive_and_past_the_end_the_last(starts, N, rows):
    x = randn(len(starts), N, 3)
    out = take_rows_reference(x, torch.tensor(starts), rows)
    assert out.shape == (len(starts), rows, 3)
    for u, start in enumerate(starts):
        for i in range(rows):
            assert torch.equal(out[u, i], x[u, min(start + i, N - 1)])


def test_take_rows_leaves_the_dtype_under_autocast():
    keys = torch._C.DispatchKey.AutocastCUDA
    of = {
        op: torch._C._dispatch_has_kernel_for_dispatch_key(f"onetrans::{op}", keys) for op in ("take_rows", "mixed_ffn")
    }
    assert of == {"take_rows": False, "mixed_ffn": True}


OPS = {
    op._name.removeprefix("onetrans::"): op
    for op in (
        history_attention_op,
        candidate_attention_op,
        mixed_linear_op,
        keys_into_state_op,
        mixed_ffn_op,
        take_rows_op,
    )
}


def test_the_schemas_are_these():
    """Bundles, lowerings and passes go by these names."""
    assert {name: [a.name for a in op._opoverload._schema.arguments] for name, op in OPS.items()} == {
        "history_attention": ["q", "k", "v", "q_start", "length", "past_k", "past_v", "past_length", "slots"],
        "candidate_attention": ["q", "k", "v", "keys", "values", "lengths", "slots"],
        "mixed_linear": ["x", "w", "gain", "eps", "bias", "residual", "activation"],
        "keys_into_state": ["x", "w", "gain", "eps", "bias", "k_state", "v_state", "slots", "first", "length"],
        "mixed_ffn": ["x", "w1", "w2", "gain", "eps", "activation", "gated", "b1", "b2"],
        "take_rows": ["x", "start", "rows"],
    }


@needs_triton
@pytest.mark.parametrize("name", list(OPS))
def test_the_kernels_schema_begins_with_the_ops(name):
    folder = {"keys_into_state": "mixed_linear"}.get(name, name)
    pytest.importorskip("triton")
    importlib.import_module(f"onetrans.kernels.{folder}.kernel")
    kernel = getattr(torch.ops.onetrans_triton, name).default._schema
    schema = OPS[name]._opoverload._schema
    ours = [(a.name, str(a.type), a.default_value, a.is_write) for a in schema.arguments]
    theirs = [(a.name, str(a.type), a.default_value, a.is_write) for a in kernel.arguments]
    assert theirs[: len(ours)] == ours
    assert all(a.has_default_value() for a in kernel.arguments[len(ours) :])
    assert [str(r.type) for r in kernel.returns] == [str(r.type) for r in schema.returns]


@pytest.mark.parametrize("name", list(LOWERINGS))
def test_an_onnx_lowering_takes_the_ops_arguments_by_their_names(name):
    schema = OPS[name]._opoverload._schema
    parameters = inspect.signature(LOWERINGS[name]).parameters
    assert list(parameters) == [a.name for a in schema.arguments]
    for argument in schema.arguments:
        default = parameters[argument.name].default
        assert argument.has_default_value() == (default is not inspect.Parameter.empty)
        assert not argument.has_default_value() or default == argument.default_value


def operands(dtype=DOUBLE):
    def leaf(*shape):
        return torch.randn(shape, dtype=dtype).requires_grad_()

    U, H, E, W, P, C = 2, 2, 3, 4, 3, 2
    history = (leaf(U, 2, H, E), leaf(U, 3, H, E), leaf(U, 3, H, E), torch.tensor([1, 0]), torch.tensor([3, 2]))
    past = (leaf(U, W, H, E), leaf(U, W, H, E), torch.tensor([4, 1]))
    rows = [leaf(P, U * C, H * E) for _ in range(3)]
    segment = ([leaf(U, W, H, E)], [leaf(U, W, H, E)], [torch.tensor([4, 0])])
    return {
        "history_attention": (history_attention_op, history_attention_reference, history),
        "history_attention append": (history_attention_op, history_attention_reference, (*history, *past)),
        "candidate_attention": (candidate_attention_op, candidate_attention_reference, (*rows, *segment, None)),
        "history_attention slots": (
            history_attention_op,
            history_attention_reference,
            (*history, *past, torch.tensor([1, 0])),
        ),
        "candidate_attention slots": (
            candidate_attention_op,
            candidate_attention_reference,
            (*rows, *segment, torch.tensor([1, 0])),
        ),
        "mixed_linear": (
            mixed_linear_op,
            mixed_linear_reference,
            (leaf(2, 3, 4), leaf(2, 4, 5), leaf(4), 1e-6, leaf(2, 5), leaf(2, 3, 5)),
        ),
        "mixed_linear activated": (
            mixed_linear_op,
            mixed_linear_reference,
            (leaf(2, 3, 4), leaf(2, 4, 5), leaf(4), 1e-6, leaf(2, 5), None, "silu"),
        ),
        "mixed_ffn": (
            mixed_ffn_op,
            mixed_ffn_reference,
            (leaf(2, 3, 4), leaf(2, 4, 8), leaf(2, 8, 4), leaf(4), 1e-6, "gelu", False),
        ),
        "take_rows": (take_rows_op, take_rows_reference, (leaf(2, 5, 3), torch.tensor([1, 4]), 3)),
    }


def test_slots_say_where_a_users_state_lies():
    U, S, W, H, E, P = 2, 4, 6, 2, 3, 2
    slots, length = torch.tensor([3, 1]), torch.tensor([6, 2])
    q, k, v, pool_k, pool_v = (
        randn(U, 2, H, E),
        randn(U, 2, H, E),
        randn(U, 2, H, E),
        randn(S, W, H, E),
        randn(S, W, H, E),
    )
    pool_k[1, 2:], pool_v[1, 2:] = float("nan"), float("nan")
    past = (pool_k[slots], pool_v[slots], length)
    zero, two = torch.zeros(U, dtype=torch.int64), torch.full((U,), 2)
    out = history_attention_reference(q, k, v, zero, two, pool_k, pool_v, length, slots)
    assert torch.equal(out, history_attention_reference(q, k, v, zero, two, *past))
    whole = history_attention_reference(q, pool_k, pool_v, length - 2, length, slots=slots)
    assert torch.equal(whole, history_attention_reference(q, *(x.nan_to_num() for x in past[:2]), length - 2, length))
    rows = [randn(P, U * 3, H * E) for _ in range(3)]
    out = candidate_attention_reference(*rows, [pool_k], [pool_v], [length], slots)
    assert torch.equal(out, candidate_attention_reference(*rows, [past[0]], [past[1]], [length]))


@pytest.mark.parametrize("name", list(operands()))
def test_an_op_is_its_reference_with_its_gradient_and_a_faithful_fake(name):
    op, reference, args = operands()[name]
    assert torch.equal(op(*args), reference(*args))
    found, expected = (torch.autograd.grad(f(*args).square().sum(), leaves(args)) for f in (op, reference))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


@pytest.mark.parametrize("name", list(operands()))
def test_bfloat16_stays_within_its_rounding_of_float64(name):
    """Inputs are rounded to bfloat16 once; inside, sums run in float32: four roundings of 2^-8 bound the result."""
    _, reference, args = operands()[name]
    with torch.no_grad():
        half = [cast(a, torch.bfloat16) for a in args]
        exact = reference(*[cast(a, DOUBLE) for a in half])
        found = reference(*half)
    assert found.dtype == torch.bfloat16
    assert float((found.double() - exact).norm() / exact.norm()) <= 4 * 2**-8


def cast(value, dtype):
    if isinstance(value, list):
        return [cast(item, dtype) for item in value]
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def leaves(args):
    flat = [item for a in args for item in (a if isinstance(a, list) else [a])]
    return [item for item in flat if isinstance(item, torch.Tensor) and item.requires_grad]
