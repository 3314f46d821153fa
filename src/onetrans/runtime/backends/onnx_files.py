"""Refuses an ONNX file that reads data outside its bundle, without onnx or protobuf: a serving host needs neither.

Of the protobuf encoding (protobuf.dev/programming-guides/encoding) it reads what leads to a TensorProto in onnx.proto.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from onetrans.errors import BundleError
from onetrans.runtime.manifest import WEIGHTS_FILE, Graph

# Message to {field number: message}; the numbers of onnx.proto.
MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},
}
TENSOR_NAME, TENSOR_EXTERNAL_DATA = 8, 13
FIXED_BYTES = {1: 8, 5: 4}
KEY = b"\n\x08location"


@dataclass(frozen=True)
class ExternalTensor:
    """A tensor whose data lies in another file."""

    name: str
    location: str


def check_graph(content: bytes, graph: Graph, path: Path) -> None:
    """Refuses a graph that reads anything but the weights that the backend hands it.

    Args:
        content: The file's bytes.
        graph: What the manifest says of it.
        path: The file, for the words of an error.

    Raises:
        BundleError: It does, or is no ONNX file as bundles hold them.
    """
    try:
        tensors = external_tensors(content)
    except ValueError as error:
        raise BundleError(f"{path} is not the ONNX file of a bundle ({error}); do not trust this bundle") from error
    for tensor in tensors:
        if tensor.location != WEIGHTS_FILE or tensor.name not in graph.weights:
            raise BundleError(
                f"{path} refers to data outside {WEIGHTS_FILE}: tensor {tensor.name!r} lies in {tensor.location!r};"
                " do not trust this bundle"
            )


def external_tensors(model: bytes) -> list[ExternalTensor]:
    """Every tensor of an ONNX file with external data, wherever in the file it stands.

    Raises:
        ValueError: The file is no protobuf; or it states a location in more than one way, such as twice, so that
            another reader could find another file.
    """
    found: list[ExternalTensor] = []
    stated: set[int] = set()
    waiting = [("model", 0, len(model))]
    while waiting:
        kind, begin, end = waiting.pop()
        if kind == "tensor":
            tensor = _external_tensor(model, begin, end, stated)
            found += [] if tensor is None else [tensor]
            continue
        for number, first, last in _fields(model, begin, end):
            if number in MESSAGES[kind]:
                waiting.append((MESSAGES[kind][number], first, last))
    # A net for what this file does not know: a location that stands nowhere above.
    for match in re.finditer(rb"(?<![A-Za-z0-9_./])location", model):
        if match.start() not in stated:
            raise ValueError(f"a location at byte {match.start()} belongs to no tensor")
    return found


def _external_tensor(model: bytes, begin: int, end: int, stated: set[int]) -> ExternalTensor | None:
    name, location, external = "", "", False
    for number, first, last in _fields(model, begin, end):
        if number == TENSOR_NAME:
            name = model[first:last].decode()
        elif number == TENSOR_EXTERNAL_DATA:
            external = True
            entry = model[first:last]
            if b"location" not in entry:
                continue
            # The one canonical form: key, then value, each once, in lengths of one byte.
            value = entry[len(KEY) + 2 :]
            if location or entry != KEY + b"\x12" + bytes([len(value) & 0x7F]) + value:
                raise ValueError(f"tensor {name!r} states its location in an unusual way")
            location = value.decode()
            stated.add(first + 2)
    return ExternalTensor(name, location) if external else None


def _fields(model: bytes, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, begin, end) of every length-delimited field of a message."""
    at = begin
    while at < end:
        tag, at = _varint(model, at)
        wire = tag & 7
        if wire == 0:
            _, at = _varint(model, at)
        elif wire in FIXED_BYTES:
            at += FIXED_BYTES[wire]
        elif wire == 2:
            size, at = _varint(model, at)
            if at + size <= end:
                yield tag >> 3, at, at + size
            at += size
        else:
            raise ValueError(f"byte {at} begins no field")
    if at != end:
        raise ValueError(f"a field runs past byte {end}")


def _varint(model: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = model[at] if at < len(model) else 0
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
    raise ValueError(f"the number before byte {at} does not end")
