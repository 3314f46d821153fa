"""Checkpoints: a folder of `config.json` and `model.safetensors`. Pickles are never opened."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from onetrans.errors import CheckpointError, ConfigError
from onetrans.files import new_folder
from onetrans.model.config import ModelConfig
from onetrans.model.onetrans import OneTrans

FORMAT, VERSION = "onetrans-checkpoint", 1
CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


def save_checkpoint(model: OneTrans, folder: str | Path, *, extra: Mapping[str, Any] | None = None) -> None:
    """Writes a checkpoint folder, whole or not at all.

    Args:
        model: On any device, in any dtype.
        folder: Must not exist.
        extra: Plain data about the training, kept under `training`.

    Raises:
        OutputExistsError: `folder` exists.
        JobError: The disk refused.
    """
    with new_folder(folder) as unfinished:
        write_checkpoint(model, unfinished, extra=extra)


def write_checkpoint(model: OneTrans, folder: Path, *, extra: Mapping[str, Any] | None = None) -> None:
    """Writes a checkpoint's files into an existing folder that nobody reads yet."""
    record = {
        "format": FORMAT,
        "version": VERSION,
        "config": model.config.to_json(),
        "weights_sha256": weights_hash(model),
        "training": dict(extra or {}),
    }
    save_file({name: _plain(tensor) for name, tensor in model.state_dict().items()}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_checkpoint(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> OneTrans:
    """Reads a checkpoint into a model in eval mode on the CPU; at no time are there two copies of the weights.

    Args:
        folder: What `save_checkpoint` wrote. The weights may also be shards that `model.safetensors.index.json` lists,
            and `weights_sha256` may be left out of a `config.json` written by hand.
        dtype: Dtype of the weights; they are cast where they were saved in another.

    Raises:
        CheckpointError: The folder is missing, incomplete, truncated, corrupt, foreign, a pickle or too new; or the
            weights do not fit the configuration, their hash or are not finite.
    """
    folder = Path(folder)
    record = read_record(folder)
    config = _model_config(folder / CONFIG_FILE, record["config"])
    with torch.device("meta"):
        model = OneTrans(config)
    _make_buffers(model)
    files = _weight_files(folder)
    _check_shapes(folder, files, model)
    weights = _read_weights(files, dtype, record.get("weights_sha256"), folder)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def read_record(folder: str | Path) -> dict[str, Any]:
    """Reads a checkpoint's `config.json`: format, version, config, weights_sha256 and training.

    Raises:
        CheckpointError: There is no such folder, or its `config.json` is missing, unreadable, foreign or too new.
    """
    folder = Path(folder)
    if folder.is_file():
        _refuse_pickle(folder)
        raise CheckpointError(f"{folder} is a file; give the checkpoint's folder ({CONFIG_FILE} and {WEIGHTS_FILE})")
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder} does not exist; give a folder that `onetrans train` wrote")
    path = folder / CONFIG_FILE
    if not path.is_file():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
        if pickles:
            _refuse_pickle(folder / pickles[0])
        raise CheckpointError(f"checkpoint {folder} lacks {CONFIG_FILE}; give a folder that `onetrans train` wrote")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = repr(record.get("format")) if isinstance(record, dict) and "format" in record else "absent"
        raise CheckpointError(f"{path} is not of this project: its format is {found}; expected {FORMAT!r}")
    version = record.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{path} has version {version!r}; expected a whole number from 1 to {VERSION}")
    if version > VERSION:
        raise CheckpointError(f"{path} has version {version}, newer than {VERSION}, the newest known; upgrade onetrans")
    if not isinstance(record.get("config"), dict):
        raise CheckpointError(f"{path} lacks the model's configuration (key 'config')")
    return record


def weights_hash(model: OneTrans) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all weights, in order of name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        _hash_tensor(digest, name, _plain(tensor))
    return digest.hexdigest()


def random_model(config: ModelConfig, seed: int = 0) -> OneTrans:
    """A model with random weights that follow from `seed`, in eval mode; leaves the global generator alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OneTrans(config).eval()


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()


def _hash_tensor(digest: hashlib._Hash, name: str, tensor: torch.Tensor) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    digest.update(json.dumps([name, dtype, list(tensor.shape)]).encode())
    digest.update(tensor.flatten().view(torch.uint8).numpy().data)


def _make_buffers(model: OneTrans) -> None:
    """Gives real values to the buffers that no checkpoint holds, after a construction on the meta device."""
    config = model.config
    for block in model.stack.blocks:
        scale = torch.ones(3 * config.d, dtype=torch.float64)
        scale[: config.d] = config.head_dim**-0.5
        block.qkv_scale = scale


def _refuse_pickle(path: Path) -> None:
    """Raises where a file is a pickle, by its name or its first bytes."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    is_pickle = len(magic) > 1 and magic[0] == 0x80 and magic[1] in range(2, 6)
    if is_pickle or magic == b"PK\x03\x04" or path.suffix in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path} is a pickle, which could run any program and is never opened; load it where it was trained and"
            " save it with onetrans.model.checkpoint.save_checkpoint (safetensors)"
        )


def _model_config(path: Path, data: Mapping[str, Any]) -> ModelConfig:
    try:
        return ModelConfig.from_json(data)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} holds a configuration that cannot be read: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    """The one weights file, or the shards of an index."""
    path, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if path.is_file():
        return [path]
    if not index.is_file():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
        if pickles:
            _refuse_pickle(folder / pickles[0])
        raise CheckpointError(f"checkpoint {folder} lacks {WEIGHTS_FILE}; copy it there or train again")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors shards: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{index} names the shard {name!r}, which is no file in {folder}")
    return [folder / name for name in names]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    _refuse_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt ({error}); copy it again") from error


def _check_shapes(folder: Path, files: list[Path], model: OneTrans) -> None:
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, list[int]] = {}
    for path in files:
        with _opened(path) as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"checkpoint {folder} lacks the tensor {name} of shape {shape} that its config needs")
        if found[name] != shape:
            raise CheckpointError(
                f"checkpoint {folder}: tensor {name} has shape {found[name]}, but the config expects {shape}"
            )
    unexpected = sorted(set(found) - set(expected))
    if unexpected:
        raise CheckpointError(f"checkpoint {folder} holds the tensor {unexpected[0]}, which its config does not know")


def _read_weights(files: list[Path], dtype: torch.dtype, sha256: object, folder: Path) -> dict[str, torch.Tensor]:
    """Reads tensor by tensor, so that no more than one is held twice; checks type, hash and finiteness."""
    home: dict[str, Path] = {}
    for path in files:
        with _opened(path) as file:
            home |= dict.fromkeys(file.keys(), path)
    digest, bad = hashlib.sha256(), ""
    weights: dict[str, torch.Tensor] = {}
    for name, path in sorted(home.items()):
        with _opened(path) as file:
            stored = file.get_tensor(name).clone()  # not the mapped file, which could change under a reader
        if not stored.is_floating_point():
            raise CheckpointError(f"checkpoint {folder}: tensor {name} is {stored.dtype}; it must be floating point")
        _hash_tensor(digest, name, stored)
        weights[name] = stored.to(dtype)
        bad = bad or ("" if bool(torch.isfinite(weights[name]).all()) else name)
    if sha256 is not None and sha256 != digest.hexdigest():
        raise CheckpointError(
            f"checkpoint {folder}: the weights' hash is {digest.hexdigest()[:16]}…, but {CONFIG_FILE} states"
            f" {str(sha256)[:16]}…; the files are not of one training, or one was changed"
        )
    if bad:
        raise CheckpointError(f"checkpoint {folder}: tensor {bad} holds NaN or infinite values; train again")
    return weights
