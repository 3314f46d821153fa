"""Lowers a program to an ONNX graph with the names and symbolic shapes of its specs."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from onnxscript import ir
from onnxscript.ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from onetrans.errors import ExportError
from onetrans.export.program import Program, to_exported
from onetrans.export.targets.base import Artifact
from onetrans.export.targets.onnx.candidate_attention import candidate_attention
from onetrans.export.targets.onnx.files import INLINE_BYTES
from onetrans.export.targets.onnx.history_attention import history_attention
from onetrans.export.targets.onnx.mixed_ffn import mixed_ffn
from onetrans.export.targets.onnx.mixed_linear import mixed_linear
from onetrans.export.targets.onnx.take_rows import take_rows
from onetrans.spec import TensorSpec

log = logging.getLogger(__name__)

OPSET = 23
LOWERINGS: dict[str, Callable[..., Any]] = {
    "mixed_linear": mixed_linear,
    "mixed_ffn": mixed_ffn,
    "history_attention": history_attention,
    "candidate_attention": candidate_attention,
    "take_rows": take_rows,
}


def lower(programs: Mapping[str, Program]) -> dict[str, Artifact[ir.Model]]:
    """Lowers every program to an ONNX model: `onetrans.export.targets.base.Lowering.lower`."""
    artifacts = {}
    for name, program in programs.items():
        began = time.perf_counter()
        model = lower_program(program, name)
        nodes = sum(1 for _ in model.graph.all_nodes())
        log.info("lower %s: %d nodes, %.0f ms", name, nodes, 1e3 * (time.perf_counter() - began))
        artifacts[name] = Artifact(value=model, inputs=program.inputs, outputs=program.outputs)
    return artifacts


def lower_program(program: Program, name: str) -> ir.Model:
    """Lowers one program to an ONNX model; weights are still inside.

    Args:
        program: A prefill, append or decode graph.
        name: What the model's graph is called.

    Raises:
        ExportError: An op has no lowering, or the exporter fails.
    """
    table = {getattr(torch.ops.onetrans, op).default: lowering for op, lowering in LOWERINGS.items()}
    try:
        with _quiet():
            made = torch.onnx.export(
                to_exported(program),
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=table,
                optimize=True,
                verbose=False,
            )
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        reason = f"{type(root).__name__}: {root}".split("\n")[0]
        raise ExportError(f"{name} cannot be lowered to ONNX: {reason}") from error
    assert made is not None
    model: ir.Model = made.model
    model.graph.name = name
    _merge_reshapes(model.graph)
    _share_sizes(model.graph)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    _clean(model, {str(symbol): dim for symbol, dim in program.symbols().items()})
    _name_constants(model.graph)
    _rename(model.graph.inputs, program.inputs)
    _rename(model.graph.outputs, program.outputs)
    model.producer_name, model.producer_version = "onetrans-export", ""
    return model


def _clean(model: ir.Model, symbols: Mapping[str, str]) -> None:
    """Drops what the exporter notes about source files, and puts the specs' symbols into all shapes."""

    def renamed(dim: Any) -> Any:
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
            text = re.sub(r"\bs\d+\b", lambda m: symbols.get(m.group(), m.group()), str(dim.value))
            return text.replace("Min(", "min(").replace("Max(", "max(")
        return dim

    model.metadata_props.clear()
    model.doc_string = None
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()
        if value.shape is not None:
            value.shape = ir.Shape([renamed(dim) for dim in value.shape])


def _merge_reshapes(graph: ir.Graph) -> None:
    """Keeps only the last of reshapes that follow one another, and none that changes nothing.

    ONNX Runtime would carry out each: there were 69 in an append.
    """
    for node in graph:
        if node.op_type != "Reshape":
            continue
        source, target = node.inputs[0], node.inputs[1]
        assert source is not None
        assert target is not None
        before = source.producer()
        shape = ir.convenience.get_const_tensor(target)
        if before is not None and before.op_type == "Reshape" and (shape is None or 0 not in shape.numpy()):
            source = before.inputs[0]  # a 0 would copy a size of the reshape before
            node.replace_input_with(0, source)
        assert source is not None
        made = node.outputs[0]
        if not made.is_graph_output() and _sizes(source) is not None and _sizes(source) == _sizes(made):
            made.replace_all_uses_with(source)


def _sizes(value: ir.Value) -> tuple[str, ...] | None:
    """The value's sizes, symbolic ones by name; None where one is unknown."""
    if value.shape is None or any(isinstance(size, ir.SymbolicDim) and size.value is None for size in value.shape):
        return None
    return tuple(str(size) for size in value.shape)


def _share_sizes(graph: ir.Graph) -> None:
    """Reads each symbolic size once, so that masks and shapes of it are made once: 355 to 307 nodes in an append."""
    known: dict[tuple[str, ...], ir.Value] = {}
    for node in graph:
        source = node.inputs[0] if node.op_type == "Shape" else None
        sizes = None if source is None else _sizes(source)
        if sizes is None:
            continue
        first, last = (node.attributes.get_int(name, default) for name, default in (("start", 0), ("end", None)))
        same = known.setdefault(sizes[first:last], node.outputs[0])
        if same is not node.outputs[0] and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(same)


def _name_constants(graph: ir.Graph) -> None:
    """Names what the exporter folded and numbered by its content, so that graphs share it."""
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes < INLINE_BYTES or not re.fullmatch(r"val_\d+", name):
            continue
        digest = hashlib.sha256(f"{tensor.dtype} {tensor.shape}".encode() + tensor.numpy().tobytes()).hexdigest()
        named = f"constant_{digest[:16]}"
        del graph.initializers[name]
        if named in graph.initializers:
            value.replace_all_uses_with(graph.initializers[named])
        else:
            value.name = named
            graph.initializers[named] = value


def _rename(values: Sequence[ir.Value], specs: Sequence[TensorSpec]) -> None:
    for value, spec in zip(values, specs, strict=True):
        value.name = spec.name
        value.shape = ir.Shape(list(spec.dims))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporters' own notes (absent torchvision, folding statistics) off the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
