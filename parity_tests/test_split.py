from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from onetrans.errors import ExportError
from onetrans.export.capture import capture, capture_model
from onetrans.export.models.base import adapt
from onetrans.export.passes.base import run_pass, run_passes
from onetrans.export.passes.drop_past import DropPast
from onetrans.export.passes.keep_rows import KeepRows
from onetrans.export.probe import probe_split
from onetrans.export.split import Split, extract, split
from onetrans.model.checkpoint import random_model
from onetrans.model.onetrans import OneTrans
from onetrans.spec import State, TensorSpec
from parity_tests.configs import VARIANTS, small_config

SIZES = {"U": 2, "C": 3, "L": 5}


@pytest.fixture(scope="module", params=list(VARIANTS))
def captured(request):
    model = random_model(small_config(**VARIANTS[request.param]), seed=3)
    adapter = adapt(model)
    whole, append = capture_model(adapter, adapter.bounds(max_users=64, max_candidates=2048))
    return request.param, model, split(whole), append


def by_scope(model: OneTrans, seed: int, sizes=SIZES):
    inputs = adapt(model).example_inputs(seed, sizes)
    candidate = {name: value for name, value in inputs.items() if name.startswith("candidate_")}
    return {name: value for name, value in inputs.items() if name not in candidate}, candidate


def named(program, values):
    return {spec.name: value for spec, value in zip(program.outputs, values, strict=True)}


def run_split(parts: Split, user, candidate):
    inputs = {**user, **candidate}
    with torch.inference_mode():
        state = parts.prefill.module(*(inputs[spec.name] for spec in parts.prefill.inputs))
        inputs |= named(parts.prefill, state)
        return parts.decode.module(*(inputs[spec.name] for spec in parts.decode.inputs))


def test_the_cut_is_keys_and_values_per_layer_and_little_else(captured):
    variant, model, parts, _ = captured
    names = {spec.name for spec in parts.report.cut}
    layers = model.config.layers
    assert {f"{kind}{layer}" for kind in "kv" for layer in range(layers)} <= names
    rest = {name for name in names if name[0] not in "kv"}
    users = {f"user_{kind}{layer}" for kind in "kv" for layer in range(layers)} | {"user_length"}
    expected = {
        "auto_split": {"lengths", "partial_product_0"},
        "intent": {"lengths", "partial_product_0"},
        "group_wise": {"lengths", "user_pooled", *users},
        "group_wise_last": {"lengths", "partial_product_0", "partial_product_1", *users},  # of the heads
    }
    assert rest == expected[variant]


def test_windows_in_the_cut_have_the_pyramids_sizes(captured):
    variant, model, parts, _ = captured
    cut = {spec.name: spec for spec in parts.report.cut}
    c = model.config
    for layer in range(c.layers):
        bound = c.pyramid.capacities[layer]
        window = "L" if bound == c.pyramid.capacities[0] else f"min({bound}, L)"
        assert cut[f"k{layer}"].dims == ("U", window, c.heads, c.head_dim), variant


def test_prefill_and_decode_equal_the_whole_model_bit_for_bit(captured):
    _, model, parts, _ = captured
    user, candidate = by_scope(model, seed=5, sizes={"U": 3, "C": 4, "L": 30})
    with torch.inference_mode():
        inputs = {**user, **candidate}
        whole = parts.whole.module(*(inputs[spec.name] for spec in parts.whole.inputs))
    for found, expected in zip(run_split(parts, user, candidate), whole, strict=True):
        assert torch.equal(found, expected)


def test_an_empty_past_leaves_nothing_behind(captured):
    variant, _, parts, append = captured
    assert not [spec.name for spec in parts.whole.inputs if spec.name.startswith("past_")]
    attentions = [n for n in parts.whole.module.graph.nodes if "attention" in str(n.target)]
    with_past = [] if append is None else [n for n in append.module.graph.nodes if "attention" in str(n.target)]
    for node in attentions:
        if "history" in str(node.target):
            assert len(node.args) == 5 or node.args[5] is None
        else:
            assert len(node.args[3]) == len(node.args[4]) == len(node.args[5])
            assert len(node.args[3]) <= (2 if variant.startswith("group_wise") else 1)
    assert not with_past or any(len(n.args) > 6 and n.args[4] is not None for n in with_past)


def test_a_past_that_another_op_reads_cannot_be_dropped():
    class Adds(nn.Module):
        def forward(self, x, past):
            return (x + past.sum(),)

    state = State(role="key", layer=0, capacity=8)
    specs = [
        TensorSpec(name="x", dtype="float32", dims=("U", "L"), scope="user"),
        TensorSpec(name="past_k0", dtype="float32", dims=("U", "L"), scope="user", state=state),
    ]
    program = capture(Adds(), (torch.ones(2, 3), torch.ones(2, 3)), specs, {"U": (1, 8), "L": (1, 8)}, ["y"])
    with pytest.raises(ExportError, match="past_k0 is read by sum_1, which is no attention"):
        run_pass(program, DropPast())


def test_the_split_scores_as_the_model_does(captured):
    _, model, parts, _ = captured
    user, candidate = by_scope(model, seed=5, sizes={"U": 3, "C": 4, "L": 30})
    with torch.inference_mode():
        expected = list(model(user, candidate).values())
    for found, logits in zip(run_split(parts, user, candidate), expected, strict=True):
        torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-6)


def test_prefill_reads_no_candidate_and_decode_no_event(captured):
    _, _, parts, _ = captured
    assert all(spec.scope == "user" for spec in parts.prefill.inputs)
    assert not [spec.name for spec in parts.prefill.inputs if spec.name.startswith("candidate_")]
    assert not [spec.name for spec in parts.decode.inputs if spec.name.startswith(("event_", "history_", "user_f"))]


def test_dead_queries_of_the_top_layer_go_with_their_weights(captured):
    _, model, parts, _ = captured
    top = model.config.layers - 1
    dead = [name for name in parts.report.dead if name.startswith("history_attention")]
    assert len(dead) == 1
    weights = {"wq_s", "w1_s", "w2_s"} | ({"wo_s"} if model.config.output_projection == "mixed" else set())
    weights |= {"bq_s", "b1_s", "b2_s"} if model.config.bias else set()
    named = {f"stack.blocks.{top}.{name}" for name in weights}
    assert named <= set(parts.report.dead_weights)
    assert not [n for n in parts.report.dead_weights if ".norm" not in n and n not in named]
    names = [node.name for node in parts.prefill.module.graph.nodes]
    assert sum(name.startswith("history_attention") for name in names) == top


def test_candidate_values_that_read_user_values_are_explained(captured):
    _, model, parts, _ = captured
    attention = [held for held in parts.report.held_back if held.node.startswith("candidate_attention")]
    assert len(attention) == model.config.layers
    assert "k0" in attention[0].inputs
    assert "candidate_" in attention[0].reason


def test_query_scale_is_folded_into_the_weights(captured):
    _, model, parts, _ = captured
    weights = parts.decode.weights()
    folded = next(value for name, value in weights.items() if name.startswith("stack.blocks.0.wqkv_ns"))
    block = model.stack.blocks[0]
    first = model.config.user_tokens
    d = model.config.d
    expected = block.wqkv_ns.detach()[first:].clone()
    expected[..., :d] *= model.config.head_dim**-0.5
    torch.testing.assert_close(folded, expected, rtol=1e-7, atol=0)
    assert not [node for node in parts.decode.module.graph.nodes if "scale" in node.name]


def test_append_graph_grows_a_state_to_that_of_a_fresh_prefill(captured):
    variant, model, parts, append = captured
    if model.config.append_chunk == 1:
        assert append is None
        return
    graph = extract(append, parts.report.cut)
    old, new = 16, 22  # within one chunk of 8
    user, _ = by_scope(model, seed=7, sizes={"U": 2, "C": 3, "L": new})
    user["history_length"] = torch.full((2,), new)
    before = {n: v[:, :old] if n.startswith("event_") else v for n, v in user.items()}
    before["history_length"] = torch.full((2,), old)
    after = {n: v[:, old:] if n.startswith("event_") else v for n, v in user.items()}
    after |= {"history_start": torch.full((2,), old), "history_length": torch.full((2,), new - old)}
    with torch.inference_mode():
        run = [parts.prefill.module(*(i[s.name] for s in parts.prefill.inputs)) for i in (user, before)]
        fresh, cached = (named(parts.prefill, state) for state in run)
        inputs = {**after, **{f"past_{name}": value for name, value in cached.items()}}
        grown = named(graph, graph.module(*(inputs[s.name] for s in graph.inputs)))
        (made,) = run_passes(graph, (KeepRows(),))
        lean, gone = made.program, made.changed
        again = lean.module(*(inputs[s.name] for s in lean.inputs))
    starts = (model.config.max_history, *model.config.keep[:-1])  # the top layer's queries are dead
    assert len(gone) == sum(before != after for before, after in itertools.pairwise(starts))
    assert not [n for n in lean.module.graph.nodes if "index_select" in n.name or n.target is torch.sym_min]
    assert all(torch.equal(a, b) for a, b in zip(again, grown.values(), strict=True))
    for name, value in grown.items():
        expected = fresh[name]
        if name[0] in "kv":
            assert value.shape[1] == new - old, variant
            expected = expected[:, old - (new - expected.shape[1]) :]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


class TwoTower(nn.Module):
    """Another ranking model: the splitter knows nothing of OneTrans."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item, self.top = nn.Linear(4, 8), nn.Linear(3, 8), nn.Linear(16, 5)

    def forward(self, user, item):
        u, i = self.user(user["x"]).relu(), self.item(item["y"]).relu()
        joined = torch.cat([u[:, None].expand(-1, i.shape[1], -1), i], dim=-1)
        return {"score": self.top(joined).sum(-1)}


TWO_TOWER_SPECS = (
    TensorSpec(name="x", dtype="float32", dims=("U", 4), scope="user"),
    TensorSpec(name="y", dtype="float32", dims=("U", "C", 3), scope="candidate"),
)


def two_tower(specs=TWO_TOWER_SPECS, module: nn.Module | None = None) -> Split:
    torch.manual_seed(0)
    arguments = ({"x": torch.randn(2, 4)}, {"y": torch.randn(2, 3, 3)})
    bounds = {"U": (1, 64), "C": (1, 512)}
    return split(capture((module or TwoTower()).eval(), arguments, specs, bounds, ("score",)))


def test_any_ranking_model_splits_with_its_partial_product_in_prefill():
    parts = two_tower()
    assert [(spec.name, spec.dims) for spec in parts.report.cut] == [("partial_product_0", ("U", 1, 5))]
    x, y = torch.randn(3, 4), torch.randn(3, 7, 3)
    with torch.inference_mode():
        (whole,) = parts.whole.module(x, y)
        inputs = {"y": y, "partial_product_0": parts.prefill.module(x)[0]}
        (found,) = parts.decode.module(*(inputs[spec.name] for spec in parts.decode.inputs))
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)


def test_a_size_of_the_candidates_keeps_a_user_value_in_decode():
    class Broadcast(nn.Module):
        def forward(self, user, item):
            ones = torch.ones(item["y"].shape[1])
            return {"score": (user["x"].sum(-1)[:, None] * ones + item["y"].sum(-1))}

    parts = two_tower(module=Broadcast())
    reasons = " ".join(held.reason for held in parts.report.held_back)
    assert "the number of candidates" in reasons
    assert [spec.dims for spec in parts.report.cut] == [("U", 1)]


def test_an_output_without_candidates_is_refused():
    class UserOnly(nn.Module):
        def forward(self, user, item):
            return {"score": user["x"].sum(-1)}

    with pytest.raises(ExportError, match="depends on no candidate"):
        two_tower(module=UserOnly())


def test_a_model_without_user_values_is_refused():
    class CandidateOnly(nn.Module):
        def forward(self, user, item):
            return {"score": item["y"].sum(-1)}

    with pytest.raises(ExportError, match="no user-scope value reaches the scores"):
        two_tower(module=CandidateOnly())


def probe_values(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(2, 4, generator=generator)}, {"y": torch.randn(2, 3, 3, generator=generator)}


def test_the_probe_passes_a_sound_split():
    (ua, ca), (ub, cb) = probe_values(0), probe_values(1)
    parts = two_tower()
    probe_split(parts, (ua, ub), (ca, cb))  # raises where it does not hold
    with torch.inference_mode():
        assert not torch.equal(parts.prefill.module(ua["x"])[0], parts.prefill.module(ub["x"])[0])


def test_the_probe_finds_state_that_candidates_change():
    # y declared to be of user scope, as a wrong feature schema would: its tower lands in the state
    wrong = (TWO_TOWER_SPECS[0], dataclasses.replace(TWO_TOWER_SPECS[1], scope="user"))
    third = (*wrong, TensorSpec(name="z", dtype="float32", dims=("U", "C"), scope="candidate"))

    class Leaky(TwoTower):
        def forward(self, user, item):
            return {"score": super().forward(user, item)["score"] + item["z"]}

    torch.manual_seed(0)
    arguments = ({"x": torch.randn(2, 4)}, {"y": torch.randn(2, 3, 3), "z": torch.randn(2, 3)})
    parts = split(capture(Leaky().eval(), arguments, third, {"U": (1, 64), "C": (1, 512)}, ("score",)))
    (ua, ca), (ub, cb) = probe_values(0), probe_values(1)
    z = {"z": torch.randn(2, 3)}
    with pytest.raises(ExportError, match="changes with the candidates"):
        probe_split(parts, (ua, ub), (ca | z, cb | z))


def test_the_probe_finds_state_that_no_user_changes():
    class Constant(nn.Module):
        def forward(self, user, item):
            return {"score": (user["x"] * 0).sum(-1)[:, None] + item["y"].sum(-1)}

    (ua, ca), (ub, cb) = probe_values(0), probe_values(1)
    with pytest.raises(ExportError, match="the same for another user"):
        probe_split(two_tower(module=Constant()), (ua, ub), (ca, cb))


def test_the_probe_finds_parts_that_differ_from_the_whole():
    parts = two_tower()
    with torch.no_grad():
        for _, buffer in parts.decode.module.named_buffers():
            buffer.add_(0.01)
    (ua, ca), (ub, cb) = probe_values(0), probe_values(1)
    # the whole graph shares its constants with neither part here
    fresh = dataclasses.replace(parts, whole=two_tower().whole, prefill=two_tower().prefill)
    with pytest.raises(ExportError, match="give another score than the whole graph"):
        probe_split(fresh, (ua, ub), (ca, cb))


def test_a_capture_without_a_spec_for_every_input_is_refused():
    arguments = ({"x": torch.randn(2, 4)}, {"y": torch.randn(2, 3, 3)})
    with pytest.raises(ExportError, match="1 input specs were declared for 2 inputs"):
        capture(TwoTower(), arguments, TWO_TOWER_SPECS[:1], {"U": (1, 64)}, ("score",))


def test_a_module_that_branches_on_data_gives_a_clear_error():
    class Branches(nn.Module):
        def forward(self, user, item):
            scale = 2.0 if user["x"].sum() > 0 else 1.0
            return {"score": item["y"].sum(-1) * scale}

    with pytest.raises(ExportError, match=r"torch\.export cannot capture Branches"):
        two_tower(module=Branches())
