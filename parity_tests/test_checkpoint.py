"""Checkpoints come back bit by bit, and every damaged or foreign one is refused in one clear line."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from onetrans.errors import CheckpointError, OutputExistsError
from onetrans.features.synthetic.logs import log_schema
from onetrans.model.checkpoint import load_checkpoint, random_model, read_record, save_checkpoint, weights_hash
from onetrans.model.config import ModelConfig

CONFIG = ModelConfig(
    name="test",
    schema=log_schema(items=60, categories=10, tags=20, item_dim=8, category_dim=4, tag_dim=4),
    event_hidden=16,
    tokenizer_hidden=16,
    l_ns=3,
    d=16,
    heads=2,
    layers=2,
    max_history=12,
    append_chunk=4,
    head_hidden=8,
)
WEIGHT = "stack.blocks.1.w1_ns"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(random_model(CONFIG, 1), tmp_path / "model", extra={"steps": 3})
    return tmp_path / "model"


def edit_record(folder: Path, change: Callable[[dict], object]) -> None:
    record = json.loads((folder / "config.json").read_text())
    change(record)
    (folder / "config.json").write_text(json.dumps(record))


def edit_weights(folder: Path, change: Callable[[dict], object], *, keep_hash: bool = False) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    if not keep_hash:
        edit_record(folder, lambda record: record.pop("weights_sha256"))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_round_trip_is_bit_equal_and_scores_alike(folder: Path) -> None:
    saved, loaded = random_model(CONFIG, 1), load_checkpoint(folder)
    assert loaded.config == CONFIG
    assert not loaded.training
    assert weights_hash(loaded) == weights_hash(saved)
    for (name, buffer), (_, expected) in zip(loaded.named_buffers(), saved.named_buffers(), strict=True):
        assert not buffer.is_meta, name
        assert torch.equal(buffer, expected), name
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    record = read_record(folder)
    assert record["training"] == {"steps": 3}
    assert record["weights_sha256"] == weights_hash(saved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_load_casts(folder: Path, dtype: torch.dtype) -> None:
    expected = random_model(CONFIG, 1).state_dict()
    for name, tensor in load_checkpoint(folder, dtype=dtype).state_dict().items():
        assert torch.equal(tensor, expected[name].to(dtype)), name


def test_weights_saved_in_bfloat16_load_as_float32(folder: Path) -> None:
    edit_weights(folder, lambda w: w.update({name: t.bfloat16() for name, t in w.items()}))
    loaded = load_checkpoint(folder)
    assert torch.equal(loaded.state_dict()[WEIGHT], random_model(CONFIG, 1).state_dict()[WEIGHT].bfloat16().float())


def test_a_model_in_bfloat16_is_saved_and_its_hash_holds(tmp_path: Path) -> None:
    save_checkpoint(random_model(CONFIG, 1).bfloat16(), tmp_path / "half")
    assert load_checkpoint(tmp_path / "half").state_dict()[WEIGHT].dtype == torch.float32


def test_shards_load_by_their_index(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    for part in (0, 1):
        save_file({name: weights[name] for name in names[part::2]}, folder / f"part{part}.safetensors")
    (folder / "model.safetensors").unlink()
    index = {name: f"part{i % 2}.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert weights_hash(load_checkpoint(folder)) == weights_hash(random_model(CONFIG, 1))
    index[names[0]] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert "'../elsewhere.safetensors', which is no file in" in refusal(folder)


def test_hash_tells_names_shapes_and_values_apart() -> None:
    first = random_model(CONFIG, 1)
    assert weights_hash(first) == weights_hash(random_model(CONFIG, 1))
    assert weights_hash(first) != weights_hash(random_model(CONFIG, 2))
    assert weights_hash(first) != weights_hash(random_model(CONFIG, 1).double())
    with torch.no_grad():
        first.norm[3] = torch.nextafter(first.norm[3], torch.tensor(2.0))
    assert weights_hash(first) != weights_hash(random_model(CONFIG, 1))


def test_random_model_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    random_model(CONFIG, 1)
    assert torch.equal(torch.rand(3), expected)


def test_an_existing_folder_is_not_overwritten(folder: Path) -> None:
    with pytest.raises(OutputExistsError, match="exists already"):
        save_checkpoint(random_model(CONFIG, 2), folder)
    assert weights_hash(load_checkpoint(folder)) == weights_hash(random_model(CONFIG, 1))


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onetrans.model.checkpoint.save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(Exception, match="disk full"):
        save_checkpoint(random_model(CONFIG, 1), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_missing_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == (
        f"checkpoint {tmp_path / 'none'} does not exist; give a folder that `onetrans train` wrote"
    )


def test_a_file_in_place_of_the_folder(folder: Path) -> None:
    path = folder / "model.safetensors"
    assert f"{path} is a file; give the checkpoint's folder" in refusal(path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".weights"])
@pytest.mark.parametrize("kind", ["zip", "pickle"])
def test_a_pickle_is_never_opened(tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"model{suffix}"
    if kind == "zip":
        torch.save({"w": torch.ones(1)}, path)
    else:
        path.write_bytes(pickle.dumps({"w": 1}))
    text = refusal(path)
    assert f"{path} is a pickle, which could run any program and is never opened" in text
    assert "load it where it was trained and save it with" in text


def test_pickles_inside_the_folder_are_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle" in refusal(folder)
    (folder / "config.json").unlink()
    assert "pytorch_model.bin is a pickle" in refusal(folder)


def test_a_pickle_named_safetensors_is_not_opened(folder: Path) -> None:
    torch.save({}, folder / "model.safetensors")
    assert "model.safetensors is a pickle" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"checkpoint {folder} lacks {name}" in refusal(folder)


@pytest.mark.parametrize("size", [0, 5, 100, -1], ids=lambda n: f"{n}-bytes")
def test_truncated_weights(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:size])
    assert re.search(r"model\.safetensors is truncated or corrupt \(.+\); copy it again", refusal(folder))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "cannot be read as JSON"),
        ("\udcff", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "is not of this project: its format is absent; expected 'onetrans-checkpoint'"),
        ('{"d": 64}', "its format is absent"),
        ('{"format": "hf"}', "its format is 'hf'"),
    ],
    ids=["cut", "not-utf8", "deep", "list", "no-format", "other-format"],
)
def test_foreign_config(folder: Path, text: str, expected: str) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert expected in refusal(folder)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (2, "has version 2, newer than 1, the newest known; upgrade onetrans"),
        (0, "has version 0; expected a whole number"),
        ("1", "has version '1'; expected a whole number"),
        (True, "has version True; expected a whole number"),
        (None, "has version None; expected a whole number"),
    ],
    ids=str,
)
def test_version(folder: Path, version: object, expected: str) -> None:
    edit_record(folder, lambda record: record.update(version=version))
    assert expected in refusal(folder)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda r: r.pop("config"), "lacks the model's configuration (key 'config')"),
        (lambda r: r["config"].update(heads=3), "config.json: config d is 16, which 3 heads do not divide"),
        (lambda r: r["config"].update(colour=1), "config.json: unknown config field colour"),
        (lambda r: r["config"].update(schema=None), "config.json"),
        (lambda r: r["config"].update(explicit_keep=["a"]), "config.json"),
    ],
    ids=["absent", "impossible", "unknown-field", "no-schema", "wrong-type"],
)
def test_configuration_that_cannot_be(folder: Path, change: Callable[[dict], object], expected: str) -> None:
    edit_record(folder, change)
    assert expected in refusal(folder)


def test_config_and_weights_that_disagree(folder: Path) -> None:
    edit_record(folder, lambda record: record["config"].update(event_hidden=24))
    assert refusal(folder) == (
        f"checkpoint {folder}: tensor events.mlps.0.up.weight has shape [16, 13], but the config expects [24, 13]"
    )


def test_missing_tensor(folder: Path) -> None:
    edit_weights(folder, lambda w: w.pop(WEIGHT))
    assert f"lacks the tensor {WEIGHT} of shape [3, 16, 64] that its config needs" in refusal(folder)


def test_unexpected_tensor(folder: Path) -> None:
    edit_weights(folder, lambda w: w.update(extra=torch.ones(2)))
    assert "holds the tensor extra, which its config does not know" in refusal(folder)


def test_integer_tensor(folder: Path) -> None:
    edit_weights(folder, lambda w: w.update(norm=torch.ones(16, dtype=torch.int64)))
    assert "tensor norm is torch.int64; it must be floating point" in refusal(folder)


def test_changed_weights(folder: Path) -> None:
    edit_weights(folder, lambda w: w[WEIGHT].add_(1e-6), keep_hash=True)
    assert "config.json states" in refusal(folder)


def test_one_flipped_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "the weights' hash is" in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    edit_weights(folder, lambda w: w[WEIGHT].view(-1).__setitem__(7, value))
    assert f"tensor {WEIGHT} holds NaN or infinite values" in refusal(folder)


def test_every_config_field_survives(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, gated=True, bias=True, norm_gain="per_token", merge="intent", eps=1e-5)
    save_checkpoint(random_model(config, 0), tmp_path / "model")
    assert load_checkpoint(tmp_path / "model").config == config
