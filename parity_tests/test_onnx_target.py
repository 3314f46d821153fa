from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnxscript.tensor import Tensor

from onetrans.errors import ExportError
from onetrans.export import export
from onetrans.export.config import ExportConfig
from onetrans.kernels import mixed_linear_reference
from onetrans.model.checkpoint import random_model
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.manifest import WEIGHTS_FILE
from onetrans.runtime.tensors import read_tensors
from parity_tests.configs import VARIANTS, small_config

SMALL = ExportConfig(max_users=8, max_candidates=600)


@pytest.fixture(
    scope="module", params=["auto_split", *(pytest.param(x, marks=pytest.mark.slow) for x in ("group_wise", "intent"))]
)
def bundle(request, tmp_path_factory):
    if request.param == "intent":
        return Bundle.open(request.getfixturevalue("intent_bundle"))
    model = random_model(small_config(**VARIANTS[request.param]), seed=3)
    return export(model, tmp_path_factory.mktemp(request.param) / "bundle", SMALL)


def graphs(bundle):
    return {
        name: onnx.load_model_from_string(bundle.contents[graph.file]) for name, graph in bundle.manifest.graphs.items()
    }


def test_every_case_is_within_the_formula_and_1e_5_of_gold(bundle):
    results = bundle.manifest.parity["results"]
    assert {result["candidates"] for result in results} >= {1, 7, 63, 100, 500}
    assert {0, 1} <= {length for result in results for length in result["lengths"]}
    assert any(result["users"] > 1 for result in results)
    appended = [result for result in results if result["name"].startswith("append")]
    assert len(appended) == (2 if bundle.manifest.can_append else 0)
    for result in results:
        assert result["passed"], result["name"]
        assert result["error"] <= result["bound"]
        assert result["relative_error"] <= 1e-5, result["name"]
        assert result["top_k"] == 1.0
        assert result["rank_correlation"] > 0.9999


def test_graphs_hold_standard_operators_of_opset_23_only(bundle):
    for model in graphs(bundle).values():
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 23)]
        assert {node.domain for node in model.graph.node} == {""}
        assert not model.functions
        assert not {node.op_type for node in model.graph.node} & {"Einsum", "Loop", "If", "Scan"}


def test_graphs_carry_no_trace_of_where_they_were_made(bundle):
    for graph in bundle.manifest.graphs.values():
        content = bundle.contents[graph.file]
        assert b".py" not in content
        assert b"site-packages" not in content


def test_names_and_shapes_are_those_of_the_manifest(bundle):
    for name, model in graphs(bundle).items():
        graph = bundle.manifest.graphs[name]
        for stated, found in ((graph.inputs, model.graph.input), (graph.outputs, model.graph.output)):
            assert [spec.name for spec in stated] == [value.name for value in found]
            for spec, value in zip(stated, found, strict=True):
                dims = tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
                assert dims == spec.dims, (name, spec.name)
                dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
                assert dtype == np.dtype(spec.dtype)


def test_large_weights_lie_in_the_weights_file_and_nowhere_else(bundle):
    for name, model in graphs(bundle).items():
        external = {}
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                external[tensor.name] = {entry.key: entry.value for entry in tensor.external_data}
            else:
                assert numpy_helper.to_array(tensor).nbytes < 1024
        assert tuple(sorted(external)) == bundle.manifest.graphs[name].weights
        assert {entry["location"] for entry in external.values()} == {WEIGHTS_FILE}


def test_graphs_share_their_weights(bundle):
    """No value is stored twice, but where one graph itself has two equal weights (norms of a random model)."""
    tensors = read_tensors(bundle.contents[WEIGHTS_FILE], WEIGHTS_FILE)
    for name, value in tensors.items():
        same = {n for n, v in tensors.items() if v.shape == value.shape and np.array_equal(v, value)}
        for graph in bundle.manifest.graphs.values():
            assert name not in graph.weights or same <= set(graph.weights)


def test_any_onnx_runtime_opens_the_graphs_from_the_folder(bundle, tmp_path):
    for graph in bundle.manifest.graphs.values():
        session = onnxruntime.InferenceSession(bundle.path / graph.file, providers=["CPUExecutionProvider"])
        assert [value.name for value in session.get_inputs()] == [spec.name for spec in graph.inputs]
        onnx.checker.check_model(bundle.path / graph.file)


def decode_inputs(bundle, U, C, W, seed=0):
    rng = np.random.default_rng(seed)
    tables = {f"candidate_{f.name}": f for f in bundle.manifest.schema.candidate}
    sizes = {"U": U, "C": C}
    inputs = {}
    for spec in bundle.manifest.graphs["decode"].inputs:
        shape = [sizes.get(d, W) if isinstance(d, str) else d for d in spec.dims]
        if spec.name == "lengths":
            inputs[spec.name] = np.full(shape, W)
        elif spec.name == "user_length":
            inputs[spec.name] = np.full(shape, 2)
        elif spec.dtype == "int64":
            inputs[spec.name] = rng.integers(0, tables[spec.name].vocab, shape)
        else:
            inputs[spec.name] = rng.standard_normal(shape).astype(np.float32)
    return inputs


def history_copies(model):
    """Values made of a history K or V before it enters a MatMul: each is a copy, or a view, of it."""
    copies = {value.name for value in model.graph.input if value.name[0] in "kv" and value.name[1:].isdigit()}
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Shape") and copies & set(node.input):
            copies |= set(node.output)
    return copies


def test_decode_reads_each_history_key_and_value_once_per_user(bundle):
    model = graphs(bundle)["decode"]
    copies = history_copies(model)
    readers = [node for node in model.graph.node if node.op_type == "MatMul" and copies & set(node.input)]
    assert len(readers) == 2 * bundle.manifest.pyramid.layers  # one Q·Kᵀ and one P·V per layer, all candidates in it
    made = sorted(copies - {value.name for value in model.graph.input})
    sizes = []
    onnx.external_data_helper.load_external_data_for_model(model, str(bundle.path))
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in made)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for C in (2, 50):
        values = session.run(made, decode_inputs(bundle, U=2, C=C, W=20))
        sizes.append({name: value.shape for name, value in zip(made, values, strict=True)})
    assert sizes[0] == sizes[1]


def test_mixed_projections_are_token_major_batched_products(bundle):
    model = graphs(bundle)["decode"]
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    products = [n for n in model.graph.node if n.op_type == "MatMul" and len(weights.get(n.input[1], ())) == 3]
    projections = 4 if bundle.manifest.model["output_projection"] == "mixed" else 3
    assert len(products) == projections * bundle.manifest.pyramid.layers
    user_tokens = [tensor.dims[1] for tensor in bundle.manifest.state if tensor.name == "user_k0"]
    positions = {weights[node.input[1]][0] for node in products}
    assert positions == {bundle.manifest.model["l_ns"] - sum(user_tokens)}


@pytest.mark.parametrize(("U", "C", "W"), [(1, 1, 1), (1, 600, 40), (8, 3, 71), (3, 1, 2)])
def test_bounds_of_decode_are_dynamic(bundle, U, C, W):
    session = onnxruntime.InferenceSession(bundle.path / "decode.onnx", providers=["CPUExecutionProvider"])
    for logits in session.run(None, decode_inputs(bundle, U, C, W)):
        assert logits.shape == (U, C)
        assert np.isfinite(logits).all()


def test_an_activation_without_a_lowering_is_named():
    from onetrans.export.targets.onnx.common import activate

    with pytest.raises(ValueError, match="no lowering for activation 'tanh'"):
        activate(None, "tanh")


@pytest.mark.parametrize("activation", [None, "gelu", "silu", "relu"])
def test_the_lowering_of_mixed_linear_is_its_reference(activation):
    from onetrans.export.targets.onnx.mixed_linear import mixed_linear

    torch.manual_seed(0)
    x, w, gain, bias, residual = (torch.randn(*size) for size in ((2, 3, 4), (2, 4, 5), (4,), (2, 5), (2, 3, 5)))
    found = mixed_linear(*map(constant, (x, w, gain)), 1e-6, constant(bias), constant(residual), activation)
    expected = mixed_linear_reference(x, w, gain, 1e-6, bias, residual, activation)
    torch.testing.assert_close(torch.from_numpy(found.value), expected)


def constant(tensor):
    return Tensor(tensor.numpy())


@pytest.mark.slow
def test_two_exports_of_the_same_weights_have_the_same_graphs(tmp_path):
    model = random_model(small_config(layers=1, explicit_keep=(64,)), seed=3)
    first, second = (export(model, tmp_path / name, SMALL) for name in ("a", "b"))
    assert first.contents == second.contents
    assert first.manifest.weights_sha256 == second.manifest.weights_sha256


@pytest.mark.slow
def test_a_model_that_cannot_be_lowered_is_refused_in_one_line(tmp_path, monkeypatch):
    from onetrans.export.targets.onnx import graph

    monkeypatch.delitem(graph.LOWERINGS, "candidate_attention")
    model = random_model(small_config(layers=1, explicit_keep=(64,)), seed=3)
    with pytest.raises(ExportError, match="decode cannot be lowered to ONNX") as raised:
        export(model, tmp_path / "bundle", SMALL)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())
