"""A bundle opens only as it was written: every changed byte, link and path that leads elsewhere is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load, save

from onetrans.errors import BundleError
from onetrans.model.onetrans import OneTrans
from onetrans.model.presets import preset
from onetrans.runtime import Bundle
from onetrans.runtime.backends.base import BackendOptions
from onetrans.runtime.manifest import Manifest
from onetrans.runtime.targets import open_backend
from onetrans.runtime.tensors import read_tensors
from parity_tests.conftest import canonical, rehash

FILES = ("append.onnx", "decode.onnx", "cases.safetensors", "manifest.json", "prefill.onnx", "weights.safetensors")
GRAPHS = ("append.onnx", "decode.onnx", "prefill.onnx")


def refusal(folder: Path) -> str:
    with pytest.raises(BundleError) as caught:
        open_backend(Bundle.open(folder), options=BackendOptions(threads=1))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_bundle_holds_what_its_manifest_lists(tiny_bundle: Path) -> None:
    opened = Bundle.open(tiny_bundle)
    assert sorted(path.name for path in tiny_bundle.iterdir()) == sorted(FILES)
    assert sorted([*opened.contents, "manifest.json"]) == sorted(FILES)
    for name, content in opened.contents.items():
        assert content == (tiny_bundle / name).read_bytes()
        assert opened.manifest.files[name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_files_can_be_read_by_whom_the_umask_lets(tiny_bundle: Path) -> None:
    previous = os.umask(0)
    os.umask(previous)
    assert {oct(path.stat().st_mode & 0o777) for path in tiny_bundle.iterdir()} == {oct(0o644 & ~previous)}


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_refused(bundle: Path, name: str) -> None:
    path = bundle / name
    original = path.read_bytes()
    rng = np.random.default_rng(FILES.index(name))
    count = 200 if name == "manifest.json" else 30
    positions = [0, len(original) - 1, *rng.integers(0, len(original), count - 2)]
    for position, flip in zip(positions, rng.integers(1, 256, count), strict=True):
        content = bytearray(original)
        content[position] ^= int(flip)
        path.write_bytes(content)
        with pytest.raises(BundleError):
            Bundle.open(bundle)
    path.write_bytes(original)
    Bundle.open(bundle)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0], ids=["empty", "half", "all-but-a-byte"])
def test_truncated(bundle: Path, name: str, kept: float) -> None:
    path = bundle / name
    content = path.read_bytes()
    path.write_bytes(content[: max(0, int(kept * len(content)) - 1)])
    text = refusal(bundle)
    assert name in text
    if name != "manifest.json":
        assert f"bytes, expected {len(content)}; export the bundle again" in text


@pytest.mark.parametrize("name", FILES)
def test_missing_file(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    assert refusal(bundle) == f"bundle {bundle} lacks {name}; export it again or copy it whole"


@pytest.mark.parametrize("name", FILES)
def test_longer_file(bundle: Path, name: str) -> None:
    with (bundle / name).open("ab") as file:
        file.write(b"\n")
    assert name in refusal(bundle)


def test_other_files_beside_those_listed_are_left_alone(bundle: Path) -> None:
    (bundle / "README.txt").write_text("ours")
    (bundle / "notes").mkdir()
    (bundle / "notes" / "link").symlink_to("/etc/passwd")
    assert sorted([*Bundle.open(bundle).contents, "manifest.json"]) == sorted(FILES)


def test_what_is_no_bundle(tmp_path: Path, bundle: Path) -> None:
    assert refusal(tmp_path / "none") == (
        f"bundle {tmp_path / 'none'} does not exist; give the folder that `onetrans export` wrote"
    )
    assert "manifest.json is not a folder; give the folder" in refusal(bundle / "manifest.json")
    (tmp_path / "empty").mkdir()
    assert "lacks manifest.json" in refusal(tmp_path / "empty")


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (1, "has schema version 1; this release reads version 2: export the bundle again"),
        (3, "has schema version 3; this release reads version 2: upgrade"),
        (10**30, f"has schema version {10**30}; this release reads version 2: upgrade"),
        (0, "has schema version 0; expected a whole number from 1"),
        (True, "has schema version True; expected"),
        (1.0, "has schema version 1.0; expected"),
        ("1", "has schema version '1'; expected"),
        (None, "has schema version None; expected"),
    ],
    ids=repr,
)
def test_schema_version(bundle: Path, version: object, expected: str) -> None:
    rehash(bundle, lambda body: body.update(schema_version=version))
    assert expected in refusal(bundle)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff", "is not text"),
        (b"[" * 200_000, "is not JSON"),
        (b"[]", "does not describe a OneTrans bundle"),
        (b'{"format": "other"}', "its format must be 'onetrans-bundle'"),
        (b'{"format": "onetrans-bundle", "schema_version": 2}', "was changed since it was written"),
        (b'{"format": "onetrans-bundle", "schema_version": 2, "name": "\\ud800"}', "was changed since it was written"),
    ],
    ids=["empty", "cut", "not-utf8", "deep", "list", "foreign", "bare", "lone-surrogate"],
)
def test_foreign_manifest(bundle: Path, content: bytes, expected: str) -> None:
    (bundle / "manifest.json").write_bytes(content)
    assert expected in refusal(bundle)


def test_a_manifest_that_is_too_long_is_not_read(bundle: Path) -> None:
    os.truncate(bundle / "manifest.json", (64 << 20) + 1)
    assert f"has {(64 << 20) + 1} bytes, expected {64 << 20}" in refusal(bundle)


def test_a_manifest_in_another_form_is_refused(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert "was changed since it was written" in refusal(bundle)


def test_every_field_is_checked_even_under_a_fresh_digest(bundle: Path) -> None:
    original = (bundle / "manifest.json").read_bytes()
    accepted = set()
    for field in json.loads(original):
        for value in (None, 3, "x", [], {}, [3], {"x": 3}):
            rehash(bundle, lambda body, field=field, value=value: body.update({field: value}))
            try:
                open_backend(Bundle.open(bundle), options=BackendOptions(threads=1))
            except BundleError as error:
                assert "\n" not in str(error)
            else:
                accepted.add((field, str(value)))
            (bundle / "manifest.json").write_bytes(original)
        rehash(bundle, lambda body, field=field: body.pop(field))
        if field != "digest":
            refusal(bundle)
        (bundle / "manifest.json").write_bytes(original)
    free = {
        "name",
        "family",
        "description",
        "device",
        "weights_sha256",
        "created",
        "split",
        "parity",
        "tools",
        "digest",
        "schema_version",
    }
    assert {field for field, _ in accepted} <= free


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors", "prefill.onnx"])
@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symlink", "hard-link"])
def test_links_are_refused(bundle: Path, tmp_path: Path, link: Callable[..., None], name: str, where: str) -> None:
    real = (bundle if where == "inside" else tmp_path) / "real"
    (bundle / name).rename(real)
    link(real, bundle / name)
    text = refusal(bundle)
    assert f"{bundle / name} is a link" in text
    assert "copy the file itself" in text


def test_a_link_to_the_whole_bundle_is_fine(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to("bundle")
    assert Bundle.open(tmp_path / "current").manifest == Bundle.open(bundle).manifest


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
def test_what_is_no_file_is_refused_at_once(bundle: Path, make: Callable[[Path], None]) -> None:
    (bundle / "prefill.onnx").unlink()
    make(bundle / "prefill.onnx")
    assert "no plain file; a bundle holds plain files only" in refusal(bundle)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", "..", ".", ".hidden", "", "a\\b", "ä", "a\n"])
def test_listed_paths_cannot_leave_the_folder(bundle: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_bytes(b"s")
    stated = {"bytes": 1, "sha256": hashlib.sha256(b"s").hexdigest()}
    rehash(bundle, lambda body: body["files"].update({name: stated}))
    assert "which leaves its folder; do not trust this bundle" in refusal(bundle)


@pytest.mark.parametrize("name", ["../bundle/prefill.onnx", "/etc/hostname", "manifest.json", "other.onnx"])
def test_a_graph_is_one_of_the_listed_files(bundle: Path, name: str) -> None:
    rehash(bundle, lambda body: body["graphs"]["prefill"].update(file=name))
    assert f"does not list {name}, which a graph needs" in refusal(bundle)


def test_weights_must_be_listed(bundle: Path) -> None:
    rehash(bundle, lambda body: body["files"].pop("weights.safetensors"))
    assert "does not list weights.safetensors" in refusal(bundle)


LOCATIONS = ["../secret", "/tmp/secret", "secret", "", "*/_ORT_MEM_ADDR_/*", "./weights.safetensors", "x" * 200]


@pytest.mark.parametrize("place", ["initializer", "attribute", "subgraph", "function", "sparse"])
@pytest.mark.parametrize("location", LOCATIONS, ids=[name[:24] or "nothing" for name in LOCATIONS])
def test_external_data_elsewhere_is_refused(bundle: Path, location: str, place: str) -> None:
    model = onnx.load(bundle / "decode.onnx", load_external_data=False)
    tensor = first_external(model)
    if place == "initializer":
        stated = next(entry for entry in tensor.external_data if entry.key == "location")
        stated.value = location
    else:
        forged = onnx.TensorProto(name=tensor.name, data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
        forged.external_data.add(key="location", value=location)
        hide(model, forged, place)
    (bundle / "decode.onnx").write_bytes(model.SerializeToString())
    rehash(bundle)
    text = refusal(bundle)
    assert "decode.onnx" in text
    assert "do not trust this bundle" in text


def first_external(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.external_data)


def hide(model: onnx.ModelProto, tensor: onnx.TensorProto, place: str) -> None:
    if place == "function":
        node = model.functions.add(name="f", domain="d").node.add(op_type="Constant")
        node.attribute.add(name="value").t.CopyFrom(tensor)
    elif place == "sparse":
        model.graph.sparse_initializer.add().values.CopyFrom(tensor)
    elif place == "attribute":
        model.graph.node[0].attribute.add(name="hidden").tensors.append(tensor)
    else:
        model.graph.node[0].attribute.add(name="hidden").g.initializer.append(tensor)


@pytest.mark.parametrize(
    "ending",
    [b"\x12\x06secret", b"\n\x08location\x12\x06secret", b"j\x02\x08\x00\x12\x06secret"],
    ids=["second-value", "second-pair", "after-an-unknown-field"],
)
def test_a_location_that_readers_could_take_for_another_is_refused(bundle: Path, ending: bytes) -> None:
    """Of a protobuf field that stands twice the last counts, so that a first, harmless one proves nothing."""
    harmless = b"\n\x08location\x12\x13weights.safetensors"
    content = (bundle / "decode.onnx").read_bytes()
    model = onnx.load_from_string(content)
    assert first_external(model).external_data[0].key == "location"
    first_external(model).external_data[0].value = "weights.safetensors" + "@" * len(ending)
    forged = model.SerializeToString()
    before = b"\n\x08location\x12" + bytes([0x13 + len(ending)]) + b"weights.safetensors" + b"@" * len(ending)
    assert forged.count(before) == 1
    forged = forged.replace(before, harmless + ending)
    assert first_external(onnx.load_from_string(forged)).external_data[0].value == "secret"
    (bundle / "decode.onnx").write_bytes(forged)
    rehash(bundle)
    assert "in an unusual way" in refusal(bundle)


def test_a_second_location_entry_is_refused(bundle: Path) -> None:
    model = onnx.load(bundle / "decode.onnx", load_external_data=False)
    first_external(model).external_data.add(key="location", value="weights.safetensors")
    (bundle / "decode.onnx").write_bytes(model.SerializeToString())
    rehash(bundle)
    assert "in an unusual way" in refusal(bundle)


def test_a_tensor_that_the_backend_is_not_handed_is_refused(bundle: Path) -> None:
    """ONNX Runtime would look for it in the working folder."""
    rehash(bundle, lambda body: body["graphs"]["decode"].update(weights=body["graphs"]["decode"]["weights"][1:]))
    assert "refers to data outside weights.safetensors" in refusal(bundle)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"not an onnx file", b"\x3a\xff\x01"], ids=repr)
def test_a_graph_that_is_no_onnx(bundle: Path, content: bytes) -> None:
    (bundle / "prefill.onnx").write_bytes(content)
    rehash(bundle)
    assert "prefill.onnx" in refusal(bundle)


@pytest.mark.parametrize("change", ["shape", "dtype", "absent"])
def test_weights_that_do_not_fit_the_graphs(bundle: Path, change: str) -> None:
    tensors = load((bundle / "weights.safetensors").read_bytes())
    name = max(tensors, key=lambda name: tensors[name].ndim)
    given = tensors.pop(name)
    if change != "absent":
        tensors[name] = given[..., :-1].copy() if change == "shape" else given.astype(np.float64)
    (bundle / "weights.safetensors").write_bytes(save(tensors))
    rehash(bundle)
    assert "cannot load" in refusal(bundle)


def test_unknown_target(bundle: Path) -> None:
    rehash(bundle, lambda body: body.update(target="abacus"))
    assert "was made for target 'abacus'; this installation runs onnx" in refusal(bundle)


def test_manifest_round_trip(tiny_bundle: Path) -> None:
    text = (tiny_bundle / "manifest.json").read_text(encoding="utf-8")
    manifest = Manifest.loads(text, "here")
    assert manifest.dumps() == text
    assert canonical(json.loads(text)) == text
    assert Manifest.loads(manifest.dumps(), "here") == manifest
    assert manifest.schema == preset("tiny").schema


def test_bytes_per_user_by_hand(tiny_bundle: Path, tiny_model: OneTrans) -> None:
    """K and V of every layer in float32, of as many tokens as the anchored windows can hold; and nothing else big."""
    c = tiny_model.config
    chunk = c.append_chunk
    tokens = [keep + chunk - 1 for keep in (c.max_history, *c.keep[:-1])]
    assert tokens == sorted(tokens, reverse=True)
    keys_and_values = sum(2 * n * c.heads * c.head_dim * 4 for n in tokens)
    manifest = Bundle.open(tiny_bundle).manifest
    by_name = {tensor.name: tensor for tensor in manifest.state}
    assert sum(by_name[f"{kind}{i}"].bytes_per_user for kind in "kv" for i in range(c.layers)) == keys_and_values
    rest = {name: tensor for name, tensor in by_name.items() if not name[1:].isdigit()}
    sizes = {"float32": 4, "int64": 8}
    by_hand = sum(int(np.prod([int(d) for d in t.dims[1:]])) * sizes[t.dtype] for t in rest.values())
    assert by_hand < keys_and_values / 100
    assert manifest.bytes_per_user == keys_and_values + by_hand
    assert json.loads(manifest.dumps())["bytes_per_user"] == manifest.bytes_per_user


@pytest.mark.parametrize("name", ["weights.safetensors", "cases.safetensors"])
def test_read_tensors_agrees_with_safetensors(tiny_bundle: Path, name: str) -> None:
    content = (tiny_bundle / name).read_bytes()
    expected, found = load(content), read_tensors(content, name)
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        assert (found[tensor].dtype, found[tensor].shape) == (value.dtype, value.shape)
        assert found[tensor].tobytes() == value.tobytes()
        assert not found[tensor].flags.writeable
        assert not found[tensor].flags.owndata


def test_read_tensors_of_awkward_shapes() -> None:
    tensors: dict[str, Any] = {
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 4), np.int64),
        "flags": np.array([True, False]),
        "wide": np.arange(6, dtype=np.float64).reshape(1, 2, 3),
    }
    found = read_tensors(save(tensors, metadata={"made": "by hand"}), "here")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert np.array_equal(found[name], value), name
        assert found[name].dtype == value.dtype


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b"3",
        b"[" * 100_000,
        b'{"w": 3}',
        b'{"w": {}}',
        *(
            json.dumps({"w": ENTRY | change}).encode()
            for change in (
                {"dtype": "F8"},
                {"dtype": ["F32"]},
                {"shape": [3]},
                {"shape": "2"},
                {"shape": [-1]},
                {"shape": [-2, -1]},
                {"shape": [2.0]},
                {"data_offsets": [0, 9]},
                {"data_offsets": [0, 16]},
                {"data_offsets": [8, 0]},
                {"data_offsets": [-8, 0]},
                {"data_offsets": [4, 0]},
                {"data_offsets": [0]},
                {"data_offsets": ["0", "8"]},
            )
        ),
    ],
    ids=lambda header: header[:60].decode(),
)
def test_read_tensors_refuses_a_header_that_does_not_fit(header: bytes) -> None:
    content = len(header).to_bytes(8, "little") + header + bytes(8)
    with pytest.raises(BundleError, match="here is not a safetensors file that this release reads"):
        read_tensors(content, "here")


@pytest.mark.parametrize("content", [b"", b"\x01", b"\xff" * 16], ids=["empty", "short", "huge-header"])
def test_read_tensors_refuses_what_has_no_header(content: bytes) -> None:
    with pytest.raises(BundleError, match="is not a safetensors file"):
        read_tensors(content, "here")


def test_a_copy_opens_where_the_original_is_gone(bundle: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(bundle, tmp_path / "elsewhere"))
    shutil.rmtree(bundle)
    opened = Bundle.open(copied)
    open_backend(opened, options=BackendOptions(threads=1))
    assert opened.path == copied
    assert set(opened.contents) == set(opened.manifest.files)
