"""Whole graphs over the Triton kernels: against the plain graphs, and bit for bit in any company."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import fx

from onetrans import kernels
from onetrans.errors import ExportError
from onetrans.export.models.base import adapt
from onetrans.model.onetrans import OneTrans
from onetrans.parity.bound import bound
from onetrans.precision import of_torch
from parity_tests.configs import VARIANTS, programs_of, small_config
from parity_tests.triton_device import DEVICE, needs_triton

pytest.importorskip("triton")

from onetrans.export.targets.triton import lower

pytestmark = needs_triton
LENGTHS, CANDIDATES = [93, 70, 5], 7
SLOTS = 6
MODELS = {**VARIANTS, "one_token": {"l_ns": 1, "layers": 2, "explicit_keep": (64, 6)}}
REFERENCES = {
    f"onetrans.{op}.default": getattr(kernels, f"{op}_reference")
    for op in ("history_attention", "candidate_attention", "mixed_linear", "mixed_ffn")
}


def on_device(program):
    """Moves weights, and what the graph makes by itself; ops whose kernels a GPU would run become their references."""

    def moved(x):
        return torch.device(DEVICE) if isinstance(x, torch.device) else x

    for node in program.module.graph.nodes:
        if node.op == "call_function":
            node.target = REFERENCES.get(str(node.target), node.target)
            for name in ("args", "kwargs"):
                setattr(node, name, fx.node.map_aggregate(getattr(node, name), moved))
    program.module.recompile()
    program.module.to(DEVICE)


class Lowered:
    """A small model's programs, plain and over the kernels, on the device."""

    def __init__(self, variant: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.config = small_config(**MODELS[variant])
        self.dtype = dtype
        model = OneTrans(self.config).eval().to(dtype)
        self.plain = programs_of(model).by_name
        self.ours = {name: artifact.value for name, artifact in lower(self.plain).items()}
        for program in (*self.plain.values(), *self.ours.values()):
            on_device(program)
        self.request = adapt(model).example_inputs(0, {"U": 3, "C": CANDIDATES, "L": max(LENGTHS)})
        self.request["history_length"] = torch.tensor(LENGTHS)
        self.request = {name: value.to(DEVICE) for name, value in self.request.items()}

    def slabs(self):
        """A pool full of NaN."""
        shape = (self.config.heads, self.config.head_dim)
        return {
            f"{kind}_state{layer}": torch.full(
                (SLOTS, self.config.pyramid.capacities[layer], *shape), float("nan"), dtype=self.dtype, device=DEVICE
            )
            for layer in range(self.config.layers)
            for kind in "kv"
        }

    def run(self, programs, name, *inputs):
        program = getattr(self, programs)[name]
        given = {key: value for part in inputs for key, value in part.items()}
        with torch.inference_mode():
            made = program.module(*(given[spec.name] for spec in program.inputs))
        return {spec.name: value for spec, value in zip(program.outputs, made, strict=True)}

    def users(self, *users, events=None, new=None, candidates=None):
        """A request of some users: their first `events` events (all of theirs), or of these the last `new` alone."""
        last = [LENGTHS[u] if events is None else events for u in users]
        if new is None:
            chunk = self.config.append_chunk
            first = [max(0, n - n % chunk - self.config.max_history) for n in last]
        else:
            first = [n - count for n, count in zip(last, new, strict=True)]
        width = max(1, *(n - m for n, m in zip(last, first, strict=True)))
        part = {}
        for name, value in self.request.items():
            if name.startswith("event_"):
                rows = [value[u, m:n] for u, n, m in zip(users, last, first, strict=True)]
                padded = value.new_zeros((len(users), width, *value.shape[2:]))
                for row, filled in zip(rows, padded, strict=True):
                    filled[: len(row)] = row
                part[name] = padded
            else:
                value = value[list(users)]
                part[name] = value[:, candidates] if name.startswith("candidate_") and candidates is not None else value
        part["history_start"] = torch.tensor(first, device=DEVICE)
        part["history_length"] = torch.tensor(last, device=DEVICE) - part["history_start"]
        return part

    def score(self, *users, slots=None, candidates=None, pool=None, state=None):
        """Prefill (unless a state is given) and decode of some users in one launch each."""
        given = self.users(*users, candidates=candidates)
        pool = pool or self.slabs()
        where = {"slots": torch.tensor(slots or list(users), device=DEVICE)}
        state = state or self.run("ours", "prefill", given, pool, where)
        return self.run("ours", "decode", given, pool, where, state)


LOWERED = [(name, dtype) for name in MODELS for dtype in (torch.bfloat16, torch.float16)]


@pytest.fixture(scope="module", params=[LOWERED[0], *(pytest.param(x, marks=pytest.mark.slow) for x in LOWERED[1:])])
def lowered(request):
    return Lowered(*request.param)


@pytest.fixture(scope="module")
def half():
    return Lowered("auto_split", torch.bfloat16)


def test_every_product_and_attention_is_a_kernel(lowered):
    left = {"aten.linear.default", "aten.bmm.default", "aten.matmul.default", "aten.mm.default"}
    for name, program in lowered.ours.items():
        targets = {str(node.target) for node in program.module.graph.nodes}
        assert not targets & left, name
        assert not {target for target in targets if target.startswith("onetrans.")}, name
        assert not [spec.name for spec in program.inputs if spec.name.startswith("past_")]
        assert not [spec for spec in program.outputs if spec.is_window]


def outside_kernels(program):
    """Names of what the program computes by itself, views left out."""
    views = (
        "view",
        "reshape",
        "select",
        "slice",
        "transpose",
        "t.",
        "chunk",
        "split",
        "expand",
        "unsqueeze",
        "squeeze",
    )
    names = [str(node.target) for node in program.module.graph.nodes if node.op == "call_function"]
    named = [name.removeprefix("aten.") for name in names if name.startswith("aten.") and "sym_size" not in name]
    return sorted(name for name in named if not name.startswith(views))


@pytest.mark.slow
def test_what_a_graph_computes_outside_its_kernels_does_not_grow_with_its_layers():
    def left(layers, keep):
        torch.manual_seed(0)
        programs = programs_of(OneTrans(small_config(layers=layers, explicit_keep=keep)))
        return [outside_kernels(artifact.value) for artifact in lower(programs.by_name).values()]

    assert left(4, (64, 48, 24, 6)) == left(3, (64, 24, 6))


def test_a_layers_activation_sum_and_layout_go_into_its_kernel(half):
    """Heads and event MLP activate, events add their behaviour, and features are laid out by position in the kernel;
    the activation after the partial product is left, whose other part is a user's."""
    for name, gelus, adds in (("prefill", 0, 3), ("append", 0, 2), ("decode", 1, 1)):
        found = outside_kernels(half.ours[name])
        assert found.count("gelu.default") == gelus, name
        assert sum(op.startswith("add.") for op in found) == adds, (name, found)
    linears = [n for n in half.ours["decode"].module.graph.nodes if "mixed_linear" in str(n.target)]
    (laid_out,) = (n.meta["val"] for n in linears if n.args[0].target is torch.ops.aten.expand.default)
    assert (laid_out.shape[0], laid_out.shape[2]) == (half.config.l_ns, half.config.d)


def test_scores_are_the_plain_programs(lowered):
    """Within the formula, gold being the same program in float64."""
    given = lowered.users(0, 1, 2)
    plain = lowered.run("plain", "decode", given, lowered.run("plain", "prefill", given))
    gold = double(lowered, given)
    ours = lowered.score(0, 1, 2, slots=[4, 0, 3])
    for task in plain:
        error = (ours[task].double() - gold[task]).abs().max()
        assert torch.isfinite(ours[task]).all()
        assert error <= allowed(plain, gold, lowered.dtype), task


def allowed(plain, gold, dtype):
    """The bound of a bundle's parity, over all tasks, since the error of one is small by luck now and then."""
    error = max(float((plain[task].double() - gold[task]).abs().max()) for task in plain)
    return bound(error, max(float(gold[task].abs().max()) for task in gold), of_torch(dtype).name)


def double(lowered, given):
    torch.manual_seed(0)
    model = OneTrans(lowered.config).eval().to(lowered.dtype).double().to(DEVICE)
    names = {"user": {}, "candidate": {}}
    for name, value in given.items():
        value = value.double() if value.is_floating_point() else value
        names["candidate" if name.startswith("candidate_") else "user"][name] = value
    with torch.inference_mode():
        return model(names["user"], names["candidate"])


@pytest.mark.slow
def test_a_candidates_score_is_its_own_in_any_company(half):
    everything = half.score(0, 1, 2)
    for user in range(3):
        alone = half.score(user, slots=[5])
        for task in everything:
            assert torch.equal(alone[task][0], everything[task][user])
    order = torch.tensor([4, 2, 6, 0, 1, 5, 3], device=DEVICE)
    moved = half.score(2, 0, slots=[1, 2], candidates=order)
    one = half.score(0, candidates=torch.tensor([3], device=DEVICE))
    for task, logits in everything.items():
        assert torch.equal(moved[task], logits[[2, 0]][:, order])
        assert torch.equal(one[task][0, 0], logits[0, 3])


def assert_same_pools(one, other):
    for name, slab in one.items():
        assert torch.equal(torch.nan_to_num(slab), torch.nan_to_num(other[name])), name
        assert torch.equal(torch.isnan(slab), torch.isnan(other[name])), f"{name}: other rows were written"


@pytest.mark.slow
def test_a_state_that_was_appended_to_is_bitwise_a_fresh_one(half):
    """Within a chunk of 8, out of slabs full of NaN; and so are the scores after it, and after no change at all."""
    where = {"slots": torch.tensor([2], device=DEVICE)}
    fresh_pool, pool = half.slabs(), half.slabs()
    fresh = half.run("ours", "prefill", half.users(0), fresh_pool, where)
    half.run("ours", "prefill", half.users(0, events=88), pool, where)
    grown = half.run("ours", "append", half.users(0, new=[5]), pool, where)
    for name in ("lengths", "partial_product_0"):
        assert torch.equal(grown[name], fresh[name])
    assert_same_pools(pool, fresh_pool)
    scores = half.score(0, slots=[2], pool=fresh_pool, state=fresh)
    for _ in range(2):
        again = half.score(0, slots=[2], pool=pool, state=grown)
        assert all(torch.equal(scores[task], again[task]) for task in scores)


def test_an_append_of_two_users_is_that_of_each(half):
    pool, alone = half.slabs(), half.slabs()
    slots = torch.tensor([0, 4], device=DEVICE)
    for u, before in ((0, 88), (1, 64)):
        for each in (pool, alone):
            half.run("ours", "prefill", half.users(u, events=before), each, {"slots": slots[[u]]})
    half.run("ours", "append", half.users(0, 1, new=[5, 6]), pool, {"slots": slots})
    for u, new in ((0, 5), (1, 6)):
        half.run("ours", "append", half.users(u, new=[new]), alone, {"slots": slots[[u]]})
    assert_same_pools(pool, alone)
    for slot, tokens in ((0, 64 + 5), (4, 64 + 6)):
        assert torch.isfinite(pool["k_state0"][slot, :tokens]).all()
        assert torch.isnan(pool["k_state0"][slot, tokens:]).all()


def test_a_program_without_windows_is_refused(half):
    program = half.plain["decode"]
    without = tuple(dataclasses.replace(spec, state=None) if spec.is_window else spec for spec in program.inputs)
    with pytest.raises(ExportError, match=r"^pass state_in_slabs: the program has no windows of keys and values"):
        lower({"decode": dataclasses.replace(program, inputs=without)})


def test_state_is_found_by_role_and_not_by_its_spelling():
    """Other names for every input and output: the lowered program has the same slabs, and computes the same."""
    programs = programs_of(OneTrans(small_config())).by_name
    lowered = lower(programs)
    renamed = {
        name: dataclasses.replace(
            program,
            inputs=tuple(dataclasses.replace(spec, name=f"in_{i}") for i, spec in enumerate(program.inputs)),
            outputs=tuple(dataclasses.replace(spec, name=f"out_{i}") for i, spec in enumerate(program.outputs)),
        )
        for name, program in programs.items()
    }
    for name, artifact in lower(renamed).items():
        ours = lowered[name].value
        assert [spec.state for spec in artifact.inputs] == [spec.state for spec in ours.inputs]
        assert [spec.dims for spec in artifact.inputs] == [spec.dims for spec in ours.inputs]
        assert [str(n.target) for n in artifact.value.module.graph.nodes if n.op == "call_function"] == [
            str(n.target) for n in ours.module.graph.nodes if n.op == "call_function"
        ]
