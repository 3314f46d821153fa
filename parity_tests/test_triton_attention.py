"""The attention kernels against float64: poisoned padding and outputs, odd lengths, any company."""

from __future__ import annotations

import pytest
import torch

from parity_tests.triton_device import DEVICE, HALVES, bound, needs_triton, poisoned

triton = pytest.importorskip("triton")

from onetrans.kernels.candidate_attention import kernel as candidate_kernel  # noqa: E402
from onetrans.kernels.candidate_attention.op import candidate_attention_reference  # noqa: E402
from onetrans.kernels.history_attention import kernel as history_kernel  # noqa: E402
from onetrans.kernels.history_attention.op import history_attention_reference  # noqa: E402
from onetrans.kernels.history_attention.rows import queried_rows  # noqa: E402

pytestmark = needs_triton
HEADS = [32, 64, 96, 128]
EXACT = HALVES if DEVICE == "cuda" else [torch.float32, torch.float16]  # rounding to half hides most of what differs


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randn(*shape, dtype):
    return torch.randn(shape, dtype=torch.float32).to(dtype).to(DEVICE)


def ints(*values):
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def double(x):
    return [double(part) for part in x] if isinstance(x, list) else x.double()


def slab(lengths, W, H, E, dtype, slots=None):
    """[slots, W, H, E]: NaN but for the valid tokens."""
    made = poisoned(len(lengths) if slots is None else slots, W, H, E, dtype=dtype)
    return made, [randn(n, H, E, dtype=dtype) for n in lengths]


def clean(x):
    """What a reference may read: no NaN, which 0 · NaN would spread."""
    return torch.nan_to_num(x)


# --- history_attention


def history(q, k, v, q_start, length, *past, slots=None):
    out = poisoned(*q.shape, dtype=q.dtype)
    history_kernel.launch(out, q, k, v, q_start, length, *past, slots=slots)
    return out


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "queries", "E"),
    [
        ([0], 1, 64),
        ([1], 1, 32),
        ([63], 12, 96),
        ([500], 500, 64),
        ([130, 0, 63, 64, 1], 70, 128),
        ([1190], 64, 96),
        ([65, 500], 300, 32),
    ],
)
def test_history_attention_is_the_references(lengths, queries, E, dtype):
    H, N, U = 2, max(lengths) + 5, len(lengths)
    q = poisoned(U, queries, H, E, dtype=dtype)
    k, v = (poisoned(U, N, H, E, dtype=dtype) for _ in range(2))
    starts = [max(0, n - queries) for n in lengths]
    for u, n in enumerate(lengths):
        k[u, :n], v[u, :n] = randn(n, H, E, dtype=dtype), randn(n, H, E, dtype=dtype)
        q[u, : n - starts[u]] = randn(n - starts[u], H, E, dtype=dtype) * E**-0.5
    out = history(q, k, v, ints(*starts), ints(*lengths))
    for u, n in enumerate(lengths):
        count = n - starts[u]
        assert not out[u, count:].any(), "rows that nobody reads are zeros"
        if count:
            parts = [q[u : u + 1, :count], k[u : u + 1, :n], v[u : u + 1, :n]]
            gold = history_attention_reference(*double(parts), ints(starts[u]), ints(n))
            plain = history_attention_reference(*parts, ints(starts[u]), ints(n))
            error = (out[u : u + 1, :count].double() - gold).abs().max()
            assert error <= bound(plain, gold, summed=v[u, :n])


@pytest.mark.parametrize("E", HEADS)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_an_append_out_of_slabs_is_bitwise_what_a_prefill_makes(E, dtype):
    """Past and new tokens as two tensors, or the slab after the new tokens were written: the same sequence of tiles."""
    H, W, past, new = 2, 300, [200, 0, 64], [8, 5, 63]
    slots = ints(4, 0, 2)
    k_slab, v_slab = (poisoned(5, W, H, E, dtype=dtype) for _ in range(2))
    q, k, v = (poisoned(3, max(new), H, E, dtype=dtype) for _ in range(3))
    fresh = []
    for u in range(3):
        total = past[u] + new[u]
        q_u, k_u, v_u = (randn(1, total, H, E, dtype=dtype) for _ in range(3))
        fresh.append(history(q_u, k_u, v_u, ints(0), ints(total))[0, past[u] :])
        k_slab[slots[u], : past[u]], v_slab[slots[u], : past[u]] = k_u[0, : past[u]], v_u[0, : past[u]]
        for mine, whole in ((q, q_u), (k, k_u), (v, v_u)):
            mine[u, : new[u]] = whole[0, past[u] :]
    apart = history(q, k, v, ints(0, 0, 0), ints(*new), k_slab, v_slab, ints(*past), slots=slots)
    for u in range(3):
        k_slab[slots[u], past[u] : past[u] + new[u]] = k[u, : new[u]]
        v_slab[slots[u], past[u] : past[u] + new[u]] = v[u, : new[u]]
    within = history(
        q, k_slab, v_slab, ints(*past), ints(*(p + n for p, n in zip(past, new, strict=True))), slots=slots
    )
    for u in range(3):
        assert torch.equal(apart[u, : new[u]], fresh[u])
        assert torch.equal(within[u, : new[u]], fresh[u])


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_a_user_does_not_feel_the_others(dtype):
    U, N, H, E = 4, 150, 2, 64
    q, k, v = (randn(U, N, H, E, dtype=dtype) for _ in range(3))
    lengths = [150, 3, 0, 90]
    together = history(q, k, v, ints(0, 0, 0, 0), ints(*lengths))
    for u, n in enumerate(lengths):
        alone = history(q[u : u + 1, : max(n, 1)], k[u : u + 1], v[u : u + 1], ints(0), ints(n))
        assert torch.equal(alone[0, :n], together[u, :n])
        tail = history(q[u : u + 1, n // 2 : max(n, 1)].contiguous(), k[u : u + 1], v[u : u + 1], ints(n // 2), ints(n))
        assert torch.equal(tail[0, : n - n // 2], together[u, n // 2 : n])


def test_tiles_that_no_query_sees_are_not_visited():
    """They hold NaN here, in tokens that do exist."""
    H, E = 1, 32
    q, k, v = (randn(1, 500, H, E, dtype=torch.float16) for _ in range(3))
    whole = history(q, k, v, ints(0), ints(500))
    k[:, 64:], v[:, 64:] = float("nan"), float("nan")
    assert torch.equal(history(q[:, :64], k, v, ints(0), ints(500)), whole[:, :64])


@pytest.mark.parametrize(("N", "rows", "D"), [(1, 1, 64), (70, 33, 96), (95, 95, 256)])
def test_queried_rows_are_the_tail_and_past_the_end_the_last(N, rows, D):
    x = randn(3, N, D, dtype=torch.float16)
    start = ints(0, N // 2, N)
    expected = torch.stack([x[u, torch.arange(rows).add(int(start[u])).clamp(max=N - 1)] for u in range(3)])
    assert torch.equal(queried_rows(x, start, rows), expected)


# --- candidate_attention


def candidates(q, k, v, keys, values, lengths, **given):
    out = poisoned(*q.shape, dtype=q.dtype)
    candidate_kernel.launch(out, q, k, v, keys, values, lengths, **given)
    return out


def segment(lengths, H, E, dtype, W=None):
    """Keys, values and lengths of one segment; padding is NaN."""
    W = W or max(lengths) + 3
    key, value = (poisoned(len(lengths), W, H, E, dtype=dtype) for _ in range(2))
    for u, n in enumerate(lengths):
        key[u, :n], value[u, :n] = randn(n, H, E, dtype=dtype), randn(n, H, E, dtype=dtype)
    return key, value, ints(*lengths)


def rows(P, B, D, dtype, E):
    """q, k and v as parts of one product's rows, 1/sqrt(E) in q."""
    joined = randn(P, B, 3 * D, dtype=dtype)
    joined[..., :D] *= E**-0.5
    return joined.chunk(3, dim=-1)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("segments", "C", "P", "E"),
    [
        ([[0]], 1, 12, 64),
        ([[1]], 7, 16, 96),
        ([[63]], 1, 4, 32),
        ([[500, 0, 257]], 7, 12, 64),
        pytest.param([[1190]], 100, 12, 64, marks=pytest.mark.slow),
        ([[3, 3], [256, 64]], 7, 5, 128),
        ([[2, 0], [130, 0], [7, 63]], 3, 16, 32),
        ([[40]], 2, 70, 32),
    ],
)
def test_candidate_attention_is_the_references(segments, C, P, E, dtype):
    H, U = 2, len(segments[0])
    if C == 100:
        H = 1
    q, k, v = rows(P, U * C, H * E, dtype, E)
    keys, values, lengths = map(list, zip(*(segment(part, H, E, dtype) for part in segments), strict=True))
    fused = candidates(q, k, v, keys, values, lengths, apart=False)
    apart = candidates(q, k, v, keys, values, lengths, apart=True)
    assert torch.equal(fused, apart), "one program or several: the same bits"
    keys, values = [clean(x) for x in keys], [clean(x) for x in values]
    gold = candidate_attention_reference(*double([q, k, v, keys, values]), lengths)
    plain = candidate_attention_reference(q, k, v, keys, values, lengths)
    error = (fused.double() - gold).abs().max()
    assert error <= bound(plain, gold, summed=torch.cat([x.flatten() for x in (v, *values)]))


@pytest.mark.parametrize("P", [1, 4, 12, 16, 17])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_a_candidate_does_not_feel_its_company_or_its_place(P, dtype):
    C, H, E, W = 41, 1, 32, 270
    q, k, v = rows(P, C, H * E, dtype, E)
    key, value, length = segment([W], H, E, dtype)
    among = candidates(q, k, v, [key], [value], [length], apart=False)
    order = torch.randperm(C, device=DEVICE)
    moved = candidates(q[:, order], k[:, order], v[:, order], [key], [value], [length])
    assert torch.equal(moved, among[:, order])
    for c in (0, 3, C - 1):
        alone = (x[:, c : c + 1].contiguous() for x in (q, k, v))
        assert torch.equal(candidates(*alone, [key], [value], [length])[:, 0], among[:, c])
    other = segment([7], H, E, dtype, W=key.shape[1])
    both = candidates(
        *(torch.cat([x.flip(1), x], dim=1) for x in (q, k, v)),
        [torch.cat([other[0], key])],
        [torch.cat([other[1], value])],
        [ints(7, W)],
    )
    assert torch.equal(both[:, C:], among)


@pytest.mark.parametrize("apart", [False, True])
def test_users_bring_as_many_candidates_as_they_have_out_of_any_slot(apart):
    H, E, P, W, counts, lengths, dtype = 2, 64, 12, 400, [9, 0, 1, 6], [330, 20, 0, 257], torch.float16
    starts, slots = ints(0, 9, 9, 10, 16), ints(5, 1, 0, 3)
    q, k, v = rows(P, sum(counts), H * E, dtype, E)
    key, value = (poisoned(6, W, H, E, dtype=dtype) for _ in range(2))
    user = segment([2, 1, 2, 0], H, E, dtype)
    for u, n in enumerate(lengths):
        key[slots[u], :n], value[slots[u], :n] = randn(n, H, E, dtype=dtype), randn(n, H, E, dtype=dtype)
    given = {"slots": slots, "starts": starts, "candidates": max(counts), "apart": apart}
    out = candidates(q, k, v, [user[0], key], [user[1], value], [user[2], ints(*lengths)], **given)
    for u, count in enumerate(counts):
        if count:
            at = slice(int(starts[u]), int(starts[u + 1]))
            mine = [x[u : u + 1] for x in user]
            slot = slice(int(slots[u]), int(slots[u]) + 1)
            alone = candidates(
                *(x[:, at].contiguous() for x in (q, k, v)),
                [mine[0], key[slot]],
                [mine[1], value[slot]],
                [mine[2], ints(lengths[u])],
            )
            assert torch.equal(out[:, at], alone)


def test_a_length_beyond_the_slab_never_reads_another_users_state():
    """No caller asks for it; if one did, it would get its own tokens and no more."""
    H, E, W, P = 1, 32, 40, 4
    q, k, v = rows(P, 3, H * E, torch.float16, E)
    pool = [randn(3, W, H, E, dtype=torch.float16) for _ in range(2)]
    tokens = randn(1, 8, H, E, dtype=torch.float16)

    def both(length):
        n, slots = ints(length), ints(1)
        candidate = [candidates(q, k, v, pool[:1], pool[1:], [n], slots=slots, apart=apart) for apart in (False, True)]
        return [*candidate, history(tokens, *pool, n - 8, n, slots=slots)]

    right = both(W)
    for x in pool:
        x[0], x[2] = float("nan"), float("nan")
    for found, expected in zip(both(W + 300)[:2], right[:2], strict=True):
        assert torch.equal(found, expected)
    assert torch.isfinite(both(W)[2]).all()


def test_what_the_kernels_cannot_take_is_refused():
    x = randn(1, 4, 2, 40, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"^head_dim is 40; the kernels take 16 to 128 that are one or two powers"):
        history(x, x, x, ints(0), ints(4))
    x = randn(1, 4, 2, 32, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"^k has shape \(1, 4, 2, 32\) and strides .*: call \.contiguous\(\)"):
        history(x, x.transpose(1, 2).contiguous().transpose(1, 2), x, ints(0), ints(4))
    rows_ = randn(2, 4, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"^4 segments were given; the kernel takes 1 to 3"):
        candidates(rows_, rows_, rows_, [x] * 4, [x] * 4, [ints(4)] * 4)
    with pytest.raises(ValueError, match=r"^starts was given without candidates"):
        candidates(rows_, rows_, rows_, [x], [x], [ints(4)], starts=ints(0, 4))
    wide = randn(129, 4, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"^129 positions were given; the kernel takes at most 128"):
        candidates(wide, wide, wide, [x], [x], [ints(4)])
