"""Launch configurations: by analysis or from the committed table, by constants of the model, few and within limits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from onetrans.kernels.candidate_attention import configs as candidate_configs
from onetrans.kernels.history_attention import configs as history_configs
from onetrans.kernels.launch import table
from onetrans.kernels.launch.config import Device, LaunchConfig, Problem, bucket
from onetrans.kernels.mixed_ffn import configs as ffn_configs
from onetrans.kernels.mixed_linear import configs as linear_configs

DEVICES = [Device(capability=capability) for capability in (80, 86, 89, 90, 100, 120)]
PROBLEMS = {
    history_configs: [{"E": E, "H": 4} for E in (32, 64, 96, 128)],
    candidate_configs: [{"E": E, "H": 4, "P": P} for E, P in ((32, 4), (64, 12), (96, 16), (128, 100))],
    linear_configs: [
        {"D": D, "F": F, "P": P, "gated": 0} for D, F, P in ((256, 768, 12), (49, 256, 1), (1536, 384, 16))
    ],
    ffn_configs: [{"D": D, "F": 4 * D, "P": P, "gated": gated} for D, P, gated in ((256, 1, 0), (384, 16, 1))],
}


def problem(sizes: dict[str, int], rows: int | None = None) -> Problem:
    return Problem(op="some_op", dtype="bfloat16", sizes=tuple(sorted(sizes.items())), rows=rows)


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a table and lets it be read."""

    def write(body: object) -> None:
        path = tmp_path / "tuned.json"
        path.write_text(json.dumps(body), encoding="utf-8")
        monkeypatch.setattr(table, "TABLE", path)
        table.tuned.cache_clear()
        table.choose.cache_clear()

    yield write
    monkeypatch.undo()
    table.tuned.cache_clear()
    table.choose.cache_clear()


def test_the_table_goes_before_the_default_for_its_device_and_problem_alone(tuned) -> None:
    fast = {"block_m": 128, "block_n": 32, "warps": 8, "stages": 2}
    tuned({"Some GPU": {"capability": 90, "ops": {"some_op": {"bfloat16": {"E=64,H=4": fast}}}}})
    here, elsewhere = Device(capability=90, name="Some GPU"), Device(capability=90, name="Another")
    what = problem({"E": 64, "H": 4})
    assert table.choose(what, here, history_configs.default) == LaunchConfig(**fast)
    assert table.tuned_devices() == [here]
    default = history_configs.default(what, elsewhere)
    assert table.choose(what, elsewhere, history_configs.default) == default != LaunchConfig(**fast)
    assert table.choose(problem({"E": 96, "H": 4}), here, history_configs.default) != LaunchConfig(**fast)
    assert table.choose(dataclasses.replace(what, dtype="float16"), here, history_configs.default) == default


def test_the_number_of_rows_counts_only_where_invariance_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(table.VARIABLE, raising=False)
    assert {table.problem("op", "float16", rows, D=1).key for rows in (1, 100, 100_000)} == {"D=1"}
    monkeypatch.setenv(table.VARIABLE, "0")
    keys = {table.problem("op", "float16", rows, D=1).key for rows in range(1, 200_000, 7)}
    assert len(keys) == 13
    assert {"D=1,rows=16", "D=1,rows=65536"} <= keys
    assert [bucket(rows) for rows in (1, 16, 17, 1190, 10**6)] == [16, 16, 32, 2048, 65536]


def test_the_committed_table_can_be_read_and_a_config_cannot_be_changed() -> None:
    assert all(isinstance(config, LaunchConfig) for config in table.tuned().values())
    config = LaunchConfig(block_m=64, block_n=64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.block_m = 128  # type: ignore[misc]
    assert hash(config) == hash(LaunchConfig(block_m=64, block_n=64))


@pytest.mark.parametrize("configs", list(PROBLEMS), ids=lambda module: module.__name__.split(".")[-2])
@pytest.mark.parametrize("device", DEVICES, ids=lambda device: f"sm_{device.capability}")
def test_what_tuning_tries_is_finite_and_fits_and_the_default_does_not_look_at_rows(configs, device: Device) -> None:
    for sizes in PROBLEMS[configs]:
        what = problem(sizes)
        tried = configs.space(what, device)
        assert 1 <= len(set(tried)) == len(tried) <= 200
        default = configs.default(what, device)
        assert configs.default(dataclasses.replace(what, rows=16), device) == default
        for config in (default, *tried):
            assert config.warps in (2, 4, 8)
            assert config.block_m >= 16
            if device.capability in (90, 100):
                assert config.block_m % 64 == 0, "a matrix instruction takes 64 rows"
