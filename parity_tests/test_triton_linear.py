"""mixed_linear and mixed_ffn in Triton against float64, amid NaN; a row's bits in any company; K and V into slabs."""

from __future__ import annotations

import pytest
import torch

from onetrans.parity.bound import FACTOR, bound
from onetrans.precision import of_torch
from parity_tests.triton_device import DEVICE, HALVES, needs_triton, poisoned

pytest.importorskip("triton")

from onetrans.kernels.launch import Device, LaunchConfig, Problem
from onetrans.kernels.mixed_ffn import configs as ffn_configs
from onetrans.kernels.mixed_ffn import kernel as ffn
from onetrans.kernels.mixed_ffn import mixed_ffn_reference
from onetrans.kernels.mixed_linear import configs as linear_configs
from onetrans.kernels.mixed_linear import kernel as linear
from onetrans.kernels.mixed_linear import keys_into_state, keys_into_state_op, mixed_linear_reference

pytestmark = needs_triton
EPS = 1e-6
GUARD = 4096  # elements; keeps the alignment of what lies between
DTYPES = HALVES if DEVICE == "cuda" else [*HALVES, torch.float32]
FUSED = LaunchConfig(block_m=64, block_n=32, warps=8, stages=2, fused=True)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def guarded(tensor):
    """The same values, contiguous amid NaN: a read beyond them that counts shows."""
    buffer = poisoned(tensor.numel() + 2 * GUARD, dtype=tensor.dtype)
    inner = buffer[GUARD:-GUARD].view(tensor.shape)
    inner.copy_(tensor)
    return inner


def randn(*shape, dtype, scale=1.0):
    return guarded((torch.randn(shape) * scale).to(dtype))


def tokens(P, B, D, dtype):
    """[P, B, D] as the middle chunk of a wider tensor whose other chunks, and rows past B, are NaN."""
    chunk = poisoned(P, B + 70, 3 * D, dtype=dtype)[:, :B, D : 2 * D]
    chunk.copy_(torch.randn(P, B, D))
    return chunk


def gains(*shape, dtype):
    return guarded((0.5 + torch.rand(shape)).to(dtype))


def filled(launch, *shape, dtype):
    """What a launch writes into a tensor of NaN amid NaN; all of it, and nothing beside it."""
    out = guarded(poisoned(*shape, dtype=dtype))
    launch(out)
    assert torch.isfinite(out).all()
    buffer = out._base
    assert torch.isnan(buffer[:GUARD]).all()
    assert torch.isnan(buffer[-GUARD:]).all()
    return out


def assert_as_good_as(found, plain, gold):
    """Within the bound of `onetrans.parity.bound`, where the ulp is that of the largest output's power of two.

    Over a thousand outputs or more the mean square error has no such allowance: a wrong rounding doubles it.
    """
    error, allowed = ((x.double() - gold).abs() for x in (found, plain))
    largest = 2.0 ** float(gold.abs().max().log2().floor())
    assert float(error.max()) <= bound(float(allowed.max()), largest, of_torch(found.dtype).name)
    if gold.numel() >= 1000 and found.dtype != torch.float32:
        assert float(error.square().mean().sqrt()) <= FACTOR * float(allowed.square().mean().sqrt())


def double(arguments):
    return [x.double() if isinstance(x, torch.Tensor) else x for x in arguments]


def linear_arguments(P, B, D, F, dtype, gain="shared", bias=True, residual=True):
    shape = {"none": None, "shared": (D,), "per position": (P, D)}[gain]
    return [
        tokens(P, B, D, dtype),
        randn(P, D, F, dtype=dtype, scale=D**-0.5),
        None if shape is None else gains(*shape, dtype=dtype),
        EPS,
        randn(P, F, dtype=dtype) if bias else None,
        randn(P, B, F, dtype=dtype) if residual else None,
    ]


def ffn_arguments(P, B, D, F, dtype, activation="gelu", gated=False, bias=True, gain="shared"):
    up = 2 * F if gated else F
    return [
        tokens(P, B, D, dtype),
        randn(P, D, up, dtype=dtype, scale=D**-0.5),
        randn(P, F, D, dtype=dtype, scale=F**-0.5),
        gains(*((P, D) if gain == "per position" else (D,)), dtype=dtype),
        EPS,
        activation,
        gated,
        *((randn(P, up, dtype=dtype), randn(P, D, dtype=dtype)) if bias else (None, None)),
    ]


SIZES = [(1, 1, 49, 1), (4, 7, 62, 33), (12, 63, 64, 64), (1, 100, 256, 192), (1, 500, 49, 33), (4, 1, 384, 192)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("P", "B", "D", "F"), SIZES, ids=str)
def test_mixed_linear_is_as_good_as_plain_pytorch(P, B, D, F, dtype):
    arguments = linear_arguments(P, B, D, F, dtype)
    found = filled(lambda out: linear.launch(out, *arguments), P, B, F, dtype=dtype)
    assert_as_good_as(found, mixed_linear_reference(*arguments), mixed_linear_reference(*double(arguments)))


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("gain", ["none", "shared", "per position"])
def test_each_part_of_mixed_linear_may_be_absent(gain, bias, residual):
    arguments = linear_arguments(3, 20, 33, 48, torch.float16, gain, bias, residual)
    found = filled(lambda out: linear.launch(out, *arguments), 3, 20, 48, dtype=torch.float16)
    assert_as_good_as(found, mixed_linear_reference(*arguments), mixed_linear_reference(*double(arguments)))
    assert torch.equal(found, torch.ops.onetrans_triton.mixed_linear(*arguments))


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
def test_mixed_linear_with_each_activation(activation, residual):
    arguments = [*linear_arguments(3, 20, 33, 48, torch.float16, residual=residual), activation]
    found = torch.ops.onetrans_triton.mixed_linear(*arguments)
    assert_as_good_as(found, mixed_linear_reference(*arguments), mixed_linear_reference(*double(arguments)))


@pytest.mark.parametrize("activation", [None, "silu"], ids=str)
def test_a_gated_mixed_linear_adds_its_residual_last(activation):
    x, w, gain, _, bias, _ = linear_arguments(3, 20, 33, 2 * 49, torch.float16)
    residual = randn(3, 20, 49, dtype=torch.float16)

    def plain(x, w, gain, bias, residual):
        gate, value = mixed_linear_reference(x, w, gain, EPS, bias).chunk(2, -1)
        return residual + (gate if activation is None else torch.nn.functional.silu(gate)) * value

    arguments = (x, w, gain, bias, residual)
    found = filled(
        lambda out: linear.launch(out, x, w, gain, EPS, bias, residual, activation=activation, gated=True),
        *(3, 20, 49),
        dtype=torch.float16,
    )
    assert_as_good_as(found, plain(*arguments), plain(*double(arguments)))


def test_a_large_mean_square_epsilon_is_added_to_the_mean_not_to_the_sum():
    x, w, gain, _, _, _ = linear_arguments(2, 9, 62, 33, torch.float16)
    found = filled(lambda out: linear.launch(out, x, w, gain, 0.5), 2, 9, 33, dtype=torch.float16)
    gold = mixed_linear_reference(x.double(), w.double(), gain.double(), 0.5)
    assert_as_good_as(found, mixed_linear_reference(x, w, gain, 0.5), gold)


@pytest.mark.parametrize("config", [None, FUSED], ids=["two launches", "fused"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
def test_mixed_ffn_with_each_activation(activation, gated, config):
    P, B, D, F = 3, 40, 48, 49
    arguments = ffn_arguments(P, B, D, F, torch.float16, activation, gated, gain="per position")
    found = filled(lambda out: ffn.launch(out, *arguments, config=config), P, B, D, dtype=torch.float16)
    assert_as_good_as(found, mixed_ffn_reference(*arguments), mixed_ffn_reference(*double(arguments)))
    if config is None:
        assert torch.equal(found, torch.ops.onetrans_triton.mixed_ffn(*arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("P", "B", "D", "F"), [(12, 7, 64, 192), (1, 100, 256, 64), (4, 63, 384, 64)], ids=str)
def test_mixed_ffn_fused_or_not_is_as_good_as_plain_pytorch(P, B, D, F, dtype):
    arguments = ffn_arguments(P, B, D, F, dtype, bias=P != 4)
    plain, gold = mixed_ffn_reference(*arguments), mixed_ffn_reference(*double(arguments))
    found = filled(lambda out: ffn.launch(out, *arguments), P, B, D, dtype=dtype)
    fused = filled(lambda out: ffn.launch(out, *arguments, config=FUSED), P, B, D, dtype=dtype)
    assert_as_good_as(found, plain, gold)
    assert_as_good_as(fused, plain, gold)
    assert_as_good_as(fused, plain, found.double())


def companies(x):
    """(rows and their order, positions) of x [P, B, D] that must give the same bits as they have among all."""
    P, B, _ = x.shape
    order = torch.randperm(B)
    yield from ((slice(row, row + 1), slice(None)) for row in (0, 63, 64, B // 3, B - 1))
    yield slice(37, 137), slice(None)
    yield order, slice(None)
    yield order[:7], slice(1, P)
    yield slice(5, 70), slice(P - 1, P)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("D", "F"), [(62, 33), (256, 64)], ids=str)
def test_the_bits_of_a_mixed_linear_row_do_not_depend_on_its_company(D, F, dtype):
    x, w, gain, _, bias, residual = linear_arguments(3, 200, D, F, dtype, "per position")
    among = filled(lambda out: linear.launch(out, x, w, gain, EPS, bias, residual), 3, 200, F, dtype=dtype)
    for rows, at in companies(x):
        part = [x[at][:, rows], w[at], gain[at], EPS, bias[at], residual[at][:, rows]]
        assert torch.equal(torch.ops.onetrans_triton.mixed_linear(*part), among[at][:, rows])
    assert torch.equal(torch.ops.onetrans_triton.mixed_linear(x.contiguous(), w, gain, EPS, bias, residual), among)


@pytest.mark.parametrize("config", [None, FUSED], ids=["two launches", "fused"])
def test_the_bits_of_a_mixed_ffn_row_do_not_depend_on_its_company(config):
    x, w1, w2, gain, _, activation, _, b1, b2 = ffn_arguments(2, 150, 64, 64, torch.bfloat16, gain="per position")

    def run(x, w1, w2, gain, b1, b2):
        out = poisoned(*x.shape, dtype=x.dtype)
        ffn.launch(out, x, w1, w2, gain, EPS, activation, False, b1, b2, config=config)
        return out

    among = run(x, w1, w2, gain, b1, b2)
    for rows, at in companies(x):
        assert torch.equal(run(x[at][:, rows], w1[at], w2[at], gain[at], b1[at], b2[at]), among[at][:, rows])


def test_positions_that_lie_oddly_are_read_right():
    """Rows at multiples of 8 elements in positions that are not, elements apart, and one row for all."""
    w = randn(3, 64, 32, dtype=torch.float16)
    odd = poisoned(3 * 20 * 64 + 3 * 5, dtype=torch.float16).as_strided((3, 20, 64), (20 * 64 + 5, 64, 1))
    apart = poisoned(3, 20, 128, dtype=torch.float16)[:, :, ::2]
    for x in (odd, apart):
        x.copy_(torch.randn(3, 20, 64))
    for x in (odd, apart, odd[:, :1].expand(3, 20, 64)):
        found = filled(lambda out, x=x: linear.launch(out, x, w), 3, 20, 32, dtype=torch.float16)
        assert torch.equal(found, torch.ops.onetrans_triton.mixed_linear(x.clone().contiguous(), w))


def expected_slabs(kv, empty, slots, first, length):
    """Slabs [slots, W, H, E] of K and V, row by row from kv [U, N, 2, H, E]."""
    slabs = [empty.clone(), empty.clone()]
    for u, n in enumerate(length):
        for i in range(min(n, empty.shape[1] - first[u])):
            for half in (0, 1):
                slabs[half][slots[u], first[u] + i] = kv[u, i, half]
    return slabs


STATES = [
    ([3, 0, 5, 5], [4, 0, 2, 5], [0, 9, 6, 2], 5, 2, 16),
    ([70], [1], [3], 130, 3, 11),
    ([0, 130], [0, 2], [0, 1], 130, 1, 96),
]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("length", "slots", "first", "N", "H", "E"), STATES, ids=["ragged", "odd", "empty"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_keys_go_into_their_rows_of_the_slabs_and_nowhere_else(length, slots, first, N, H, E, dtype, bias):
    U, W, D = len(length), max(10, N - 3), 62
    x, w, gain, _, b, _ = linear_arguments(1, U * N, D, 2 * H * E, dtype, bias=bias)
    for u, n in enumerate(length):
        x[0, u * N + n : (u + 1) * N] = float("nan")
    empty = poisoned(6, W, H, E, dtype=dtype)
    k_state, v_state = guarded(empty), guarded(empty)
    integers = [torch.tensor(values, device=DEVICE) for values in (slots, first, length)]
    torch.ops.onetrans_triton.keys_into_state(x, w, gain, EPS, b, k_state, v_state, *integers)
    kv = torch.ops.onetrans_triton.mixed_linear(x, w, gain, EPS, b).view(U, N, 2, H, E)
    for found, expected in zip((k_state, v_state), expected_slabs(kv, empty, slots, first, length), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.isnan(found._base[:GUARD]).all()
        assert torch.isnan(found._base[-GUARD:]).all()
    assert torch.isfinite(k_state).any()


@pytest.mark.parametrize(("length", "slots", "first", "N", "H", "E"), STATES, ids=["ragged", "odd", "empty"])
def test_the_op_that_puts_keys_into_slabs_is_mixed_linear_in_double_precision(length, slots, first, N, H, E):
    U, W = len(length), max(10, N - 3)
    x, w, gain, _, bias, _ = double(linear_arguments(1, U * N, 7, 2 * H * E, torch.float16))
    empty = poisoned(6, W, H, E, dtype=torch.float64)
    k_state, v_state = empty.clone(), empty.clone()
    integers = [torch.tensor(values, device=DEVICE) for values in (slots, first, length)]
    keys_into_state(x, w, gain, EPS, bias, k_state, v_state, *integers)
    kv = mixed_linear_reference(x, w, gain, EPS, bias).view(U, N, 2, H, E)
    for found, expected in zip((k_state, v_state), expected_slabs(kv, empty, slots, first, length), strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        keys_into_state_op, (x, w, gain, EPS, bias, empty, empty.clone(), *integers), test_utils=tests
    )


def test_what_the_kernels_cannot_take_is_said():
    x, w, gain, _, bias, residual = linear_arguments(2, 3, 16, 16, torch.float16)
    out = poisoned(2, 3, 16, dtype=torch.float16)
    for message, call in {
        "w has dtype torch.bfloat16": lambda: linear.launch(out, x, w.bfloat16()),
        "x has dtype torch.float64": lambda: linear.launch(out, x.double(), w),
        r"w has shape \(2, 16, 15\)": lambda: linear.launch(out, x, w[:, :, :15], gated=True),
        r"gain has shape \(15,\); expected \(16,\)": lambda: linear.launch(out, x, w, gain[:15]),
        "bias has shape": lambda: linear.launch(out, x, w, gain, EPS, bias[:1]),
        "residual has shape": lambda: linear.launch(out, x, w, gain, EPS, bias, residual[:, :1]),
        "unknown activation 'tanh'; allowed: gelu": lambda: linear.launch(out, x, w, activation="tanh"),
        "D is 17; the fused mixed_ffn takes": lambda: ffn_configs.parts(17),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("gated", [0, 1], ids=["plain", "gated"])
@pytest.mark.parametrize("D", [49, 64, 256, 384])
def test_configurations_fit_the_device_and_depend_on_the_model_alone(D, gated, capability):
    device = Device(capability=capability)
    for F in (1, 33, 192, 768, 1536):
        chosen = set()
        for P in (1, 12):
            sizes = (("D", D), ("F", F), ("P", P), ("gated", gated))
            what = Problem(op="mixed_linear", dtype="bfloat16", sizes=sizes)
            space = linear_configs.space(what, device)
            chosen.add(linear_configs.default(what, device))
            assert linear_configs.default(what, device) in space
            for config in space:
                assert linear_configs.shared_bytes(config, what) <= device.shared_bytes
                assert config.block_m // config.warps >= 8
                assert capability < 90 or config.block_m >= 64
            for config in ffn_configs.space(what, device):
                assert not config.fused or ffn_configs.shared_bytes(config, what) <= device.shared_bytes
        assert len(chosen) == 1
        assert not ffn_configs.default(what, device).fused
