"""The precision table: its rows against torch and numpy, conversions against torch's, and who keeps values in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from onetrans.errors import ConfigError
from onetrans.precision import BY_NAME, TABLE, DType, narrow, of_torch, precision, widen
from onetrans.runtime.bundle import Bundle
from onetrans.runtime.manifest import Manifest
from onetrans.runtime.pools.host import HostPool
from onetrans.runtime.tensors import read_tensors

HALF: tuple[DType, ...] = ("float16", "bfloat16")


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_rows_are_torchs(row) -> None:
    assert of_torch(row.torch) == row
    assert torch.empty(0, dtype=row.torch).element_size() == row.nbytes == row.numpy.itemsize
    assert row.is_float == row.torch.is_floating_point
    assert row.ulp == (torch.finfo(row.torch).eps if row.is_float else 0)
    assert {row.name, row.short} & {row.name} == {row.name}
    assert precision(row.name) == row
    if row.short:
        assert precision(row.short) == row


def test_names_that_are_not_in_it() -> None:
    with pytest.raises(ConfigError, match=r"^unknown precision 'fp8'; allowed: fp32, fp16, bf16"):
        precision("fp8")
    with pytest.raises(ConfigError, match="dtype complex64 is not one of"):
        of_torch(torch.complex64)


@pytest.mark.parametrize("dtype", HALF)
def test_conversions_round_as_torch_does(dtype: DType) -> None:
    rng = np.random.default_rng(0)
    special = [0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-40, 65504.0, 65520.0, 3.4e38, 1 + 2.0**-8, 1 + 3 * 2.0**-8]
    values = np.concatenate([rng.standard_normal(10_000) * 10.0 ** rng.integers(-30, 30, 10_000), special])
    values = values.astype(np.float32)
    expected = torch.from_numpy(values).to(BY_NAME[dtype].torch)
    stored = narrow(values, dtype)
    assert stored.dtype == BY_NAME[dtype].numpy
    assert np.array_equal(stored.view(np.uint16), expected.view(torch.int16).numpy().view(np.uint16))
    assert np.array_equal(widen(stored, dtype).astype(np.float64), expected.double().numpy())
    assert np.isnan(widen(narrow(np.array([np.nan], np.float32), dtype), dtype)).all()


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "bool"])
def test_other_dtypes_are_kept_as_they_are(dtype: DType) -> None:
    values = np.array([0, 1, 1], BY_NAME[dtype].numpy)
    assert widen(values, dtype) is values
    assert narrow(values, dtype) is values


@pytest.mark.parametrize("dtype", HALF)
def test_the_safetensors_reader_knows_half_precision(dtype: DType) -> None:
    value = torch.randn(3, 5).to(BY_NAME[dtype].torch)
    (found,) = read_tensors(save({"x": value}), "here").values()
    assert np.array_equal(widen(found, dtype).astype(np.float32), value.float().numpy())


@pytest.fixture
def manifest(tiny_bundle: Path) -> Manifest:
    return Bundle.open(tiny_bundle).manifest


@pytest.mark.parametrize("dtype", HALF)
def test_a_pool_holds_half_precision(manifest: Manifest, dtype: DType) -> None:
    state = tuple(
        dataclasses.replace(spec, dtype=dtype) if BY_NAME[spec.dtype].is_float else spec for spec in manifest.state
    )
    half = dataclasses.replace(manifest, state=state)
    assert half.bytes_per_user < 0.51 * manifest.bytes_per_user
    pool = HostPool(half, 3)
    assert pool.nbytes == 3 * half.bytes_per_user == sum(slab.nbytes for slab in pool.slabs.values())
    rng = np.random.default_rng(1)
    tokens = np.array([5, 3])
    made, values = [], {}
    for spec in half.state:
        shape = (1, int(tokens[spec.state.layer]), *spec.shape_per_user[1:]) if spec.is_window else None
        drawn = rng.standard_normal(shape or (1, *spec.shape_per_user))
        values[spec.name] = tokens[None] if spec.is_lengths else drawn
        made.append(tokens[None] if spec.is_lengths else narrow(drawn, spec.dtype))
    pool.store([1], made, np.zeros((1, 2), np.int64))
    assert pool.lengths(1).tolist() == [5, 3]
    pool.copy(1, 2, drop=(2, 0))
    moved, whole = pool.read(2), pool.read(1)
    pool.write(0, whole)
    for spec in half.state:
        back = pool.read(0)[spec.name]
        assert back.dtype == BY_NAME[spec.dtype].numpy
        assert np.array_equal(back, whole[spec.name])
        if not spec.is_lengths:
            error = np.abs(widen(back, spec.dtype) - values[spec.name]).max()
            assert error <= BY_NAME[spec.dtype].ulp * np.abs(values[spec.name]).max() / 2
        if spec.is_window:
            first = 2 if spec.state.layer == 0 else 0
            assert np.array_equal(moved[spec.name], whole[spec.name][:, first:])
