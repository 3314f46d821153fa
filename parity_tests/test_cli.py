"""What every command gives: results on stdout, progress on stderr, and JSON that is one object and nothing else."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from onetrans.cli.main import COMMANDS
from onetrans.features.logs import write_logs
from onetrans.features.random_requests import first_events
from onetrans.features.requests import read_requests, write_requests
from onetrans.features.synthetic.logs import generate
from onetrans.model.checkpoint import random_model, save_checkpoint
from onetrans.model.presets import preset
from onetrans.runtime import Bundle, Ranker
from parity_tests.conftest import Command, error_line, listing, rehash, request_of

SVG = "{http://www.w3.org/2000/svg}"


def one_object(text: str) -> dict[str, Any]:
    assert text.count("\n") == 1
    assert text.endswith("}\n")
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.mark.parametrize("args", [(), ("--help",), ("-h",)], ids=["bare", "--help", "-h"])
def test_the_group_lists_its_commands(run_cli: Command, args: tuple[str, ...]) -> None:
    done = run_cli(*args)
    assert (done.returncode, done.stderr) == (0, "")
    for command, what in COMMANDS.items():
        assert f"{command} " in done.stdout
        assert what in done.stdout


def test_verify_prints_a_table(run_cli: Command, tiny_bundle: Path) -> None:
    done = run_cli("verify", tiny_bundle)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "pass" in line]
    assert len(rows) == 9
    assert sum("append" in row for row in rows) == 2
    assert "FAIL" not in done.stdout
    assert f"verifying {tiny_bundle}: empty history" in done.stderr


def test_verify_as_json(run_cli: Command, tiny_bundle: Path) -> None:
    done = run_cli("verify", tiny_bundle, "--json")
    assert done.returncode == 0, done.stderr
    found = one_object(done.stdout)
    assert found["passed"] is True
    full = preset("tiny").max_history
    assert [case["lengths"] for case in found["cases"]][:5] == [[0], [1], [full // 10 + 1], [full], [full]]
    for case in found["cases"]:
        assert 0 < case["error"] <= case["bound"] < 1e-5
        assert case["relative_error"] < 1e-5
        assert case["top_k"] == 1.0 or case["candidates"] == 500
        assert case["rank_correlation"] > 0.999


def edit_tensors(bundle: Path, name: str, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    (bundle / name).write_bytes(save(change(load((bundle / name).read_bytes()))))
    rehash(bundle)


def shake(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every weight off by about a thousandth of itself."""
    rng = np.random.default_rng(0)
    return {
        name: (t * (1 + 1e-3 * rng.standard_normal(t.shape))).astype(t.dtype) if t.dtype.kind == "f" else t
        for name, t in tensors.items()
    }


def test_verify_fails_where_the_weights_are_off_by_a_thousandth(run_cli: Command, bundle: Path) -> None:
    edit_tensors(bundle, "weights.safetensors", shake)
    done = run_cli("verify", bundle, "--json")
    found = one_object(done.stdout)
    assert found["passed"] is False
    assert not any(case["passed"] for case in found["cases"])
    assert all(1e-5 < case["relative_error"] < 1e-1 for case in found["cases"])
    done.stdout = ""
    assert "9 of 9 parity cases failed; the worst, " in error_line(done, 1)
    table = run_cli("verify", bundle)
    assert table.returncode == 1
    assert table.stdout.count("FAIL") == 9


def test_verify_fails_on_nan_and_its_json_stays_json(run_here: Command, bundle: Path) -> None:
    edit_tensors(bundle, "weights.safetensors", lambda tensors: {n: t * np.float32("nan") for n, t in tensors.items()})
    done = run_here("verify", bundle, "--json")
    found = one_object(done.stdout.replace("NaN", "not JSON"))
    assert found["passed"] is False
    assert {case["error"] for case in found["cases"]} == {None}
    done.stdout = ""
    error_line(done, 1)


def test_verify_refuses_cases_that_are_not_all_there(run_here: Command, bundle: Path) -> None:
    edit_tensors(
        bundle, "cases.safetensors", lambda t: {n: v for n, v in t.items() if not n.startswith("1/reference/")}
    )
    line = error_line(run_here("verify", bundle), 2)
    assert "does not hold the 9 cases stated" in line


def test_verify_fails_where_nothing_was_compared(run_here: Command, bundle: Path) -> None:
    edit_tensors(bundle, "cases.safetensors", lambda tensors: {})
    line = error_line(run_here("verify", bundle), 1)
    assert line == "nothing was compared: the bundle carries no parity case; export it again"
    (bundle / "cases.safetensors").unlink()
    rehash(bundle, lambda body: body["files"].pop("cases.safetensors"))
    assert "carries no cases.safetensors; export it again" in error_line(run_here("verify", bundle), 2)


def test_verify_against_a_checkpoint(
    run_here: Command, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    done = run_here("verify", tiny_bundle, "--checkpoint", tiny_checkpoint, "--seed", 7, "--json")
    assert done.returncode == 0, done.stderr
    fresh, stored = one_object(done.stdout), one_object(run_here("verify", tiny_bundle, "--json").stdout)
    assert fresh["passed"] is True
    assert [case["name"] for case in fresh["cases"]] == [case["name"] for case in stored["cases"]]
    assert [case["error"] for case in fresh["cases"]] != [case["error"] for case in stored["cases"]]
    save_checkpoint(random_model(preset("tiny"), 5), tmp_path / "other")
    line = error_line(run_here("verify", tiny_bundle, "--checkpoint", tmp_path / "other"), 1)
    assert "holds other weights than" in line
    assert "does not exist" in error_line(run_here("verify", tiny_bundle, "--checkpoint", tmp_path / "none"), 2)


def test_inspect_shows_the_cut(run_cli: Command, bundle: Path) -> None:
    before = listing(bundle.parent)
    done = run_cli("inspect", bundle)
    assert (done.returncode, done.stderr) == (0, "")
    manifest = Bundle.open(bundle).manifest
    assert f"the cut: state, at most {manifest.bytes_per_user:,} bytes per user" in done.stdout
    lines = done.stdout.splitlines()
    for tensor in manifest.state:
        assert any(tensor.name in line and f"{tensor.bytes_per_user:,}" in line for line in lines), tensor
    for name in manifest.graphs:
        assert any(f" {name} " in line for line in lines), name
    assert listing(bundle.parent) == before  # nothing is drawn unasked


def boxes(root: ET.Element) -> list[tuple[float, float, float, float]]:
    """Left, top, right and bottom of every box of the picture."""
    found = []
    for rect in root.iter(f"{SVG}rect"):
        if "rx" in rect.attrib:
            x, y, width, height = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
            found.append((x, y, x + width, y + height))
    return found


def test_inspect_draws_where_it_is_told(run_here: Command, bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "split.svg"
    done = run_here("inspect", bundle, "--svg", picture)
    assert (done.returncode, done.stderr) == (0, f"drew {picture}\n")
    root = ET.parse(picture).getroot()
    assert root.tag == f"{SVG}svg"
    text = " ".join(root.itertext())
    for word in (
        *("prefill: once per user", "decode: per candidate", "k0, v0", "k1, v1", "ctr, cvr logits"),
        *("profile and context", "age, interests", "behaviour, item_id", "the cut", "user scope", "candidate scope"),
    ):
        assert word in text
    arrows = [line for line in root.iter(f"{SVG}line") if "stroke-dasharray" not in line.attrib]
    assert len(arrows) == 2 * 3 + 2 + 3  # across: the request and two layers; down: prefill and decode
    for arrow in arrows:
        x, y = float(arrow.attrib["x1"]), float(arrow.attrib["y1"])
        starts = [left <= x <= right and top <= y <= bottom for left, top, right, bottom in boxes(root)]
        assert any(starts), arrow.attrib  # none in mid-air
    width = float(root.attrib["width"])
    for left, _, right, _ in boxes(root):
        assert 0 < left < right < width


def test_inspect_as_json(run_here: Command, bundle: Path, tmp_path: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    for options, picture in (((), None), (("--svg", tmp_path / "split.svg"), str(tmp_path / "split.svg"))):
        found = one_object(run_here("inspect", bundle, "--json", *options).stdout)
        assert found.pop("picture") == picture
        assert found.pop("bundle")["path"] == str(bundle)
        assert found == manifest


def test_inspect_draws_over_an_older_picture_and_over_nothing_else(run_here: Command, bundle: Path) -> None:
    old = bundle.with_name("bundle.svg")
    old.write_text("<svg>older</svg>")
    assert run_here("inspect", bundle, "--svg", old).returncode == 0
    assert "older" not in old.read_text()
    before = listing(bundle.parent)
    line = error_line(run_here("inspect", bundle, "--svg", bundle / "manifest.json"), 2)
    assert "manifest.json exists already and is no picture" in line
    for path in (bundle, bundle / "none" / "x.svg"):
        assert "cannot be written: give a file in a folder" in error_line(run_here("inspect", bundle, "--svg", path), 2)
    assert listing(bundle.parent) == before


def test_every_command_says_the_same_of_a_bundle(run_here: Command, tiny_bundle: Path, requests_file: Path) -> None:
    manifest = Bundle.open(tiny_bundle).manifest
    stated = ("name", "target", "device", "precision", "weights_sha256")
    expected = {"path": str(tiny_bundle), **{name: getattr(manifest, name) for name in stated}}
    costs = ("--prefill-ms", 9, "--append-ms", 1, "--decode-ms", 1)
    for command, *options in (
        ("verify",),
        ("inspect",),
        ("score", "--input", requests_file),
        ("bench", "--requests", 20, "--events", 1, "--candidates", 1),
        ("plan", "--users", 9, "--qps", 0.01, "--state-memory", "9MB", "--requests", 1000, *costs),
    ):
        found = one_object(run_here(command, tiny_bundle, *options, "--json").stdout)
        assert {name: found["bundle"][name] for name in expected} == expected, command


def test_score_prints_a_table_per_request(run_cli: Command, tiny_bundle: Path, requests_file: Path) -> None:
    done = run_cli("score", tiny_bundle, "--input", requests_file, "--top", 3)
    assert (done.returncode, done.stderr) == (0, "")
    titles = [line.strip() for line in done.stdout.splitlines() if line.startswith("request")]
    assert titles == ["request request 0", "request request 1", "request request 2"]
    first = next(line for line in done.stdout.splitlines() if line.startswith("│    1 "))
    request = read_requests(requests_file, preset("tiny").schema)[0]
    scores = Ranker.open(tiny_bundle).rank(
        history=request.history, profile=request.profile, candidates=request.candidates
    )
    best = int(scores.ranking()[0])
    cells = [cell.strip() for cell in first.strip("│").split("│")]
    assert cells == ["1", str(best), *(f"{p[best]:.4f}" for p in scores.probabilities().values())]
    assert done.stdout.count("3 of 12 candidates; --top 12 shows all") == 3
    done = run_cli("score", tiny_bundle, "--input", requests_file, "--top", 12)
    assert "candidates;" not in done.stdout


def test_score_as_json_and_to_a_file(
    run_cli: Command, run_here: Command, tiny_bundle: Path, requests_file: Path, tmp_path: Path
) -> None:
    done = run_cli("score", tiny_bundle, "--input", requests_file, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = one_object(done.stdout)
    assert found["bundle"]["name"] == "tiny"
    ranker = Ranker.open(tiny_bundle)
    requests = read_requests(requests_file, preset("tiny").schema)
    assert len(found["requests"]) == len(requests) == 3
    for index, (plain, request) in enumerate(zip(found["requests"], requests, strict=True)):
        scores = ranker.rank(history=request.history, profile=request.profile, candidates=request.candidates)
        assert plain["request"] == f"request {index}"
        assert plain["ranking"] == scores.ranking().tolist() == np.argsort(-scores.logits["ctr"]).tolist()
        for task in ("ctr", "cvr"):
            assert plain["logits"][task] == scores.logits[task].tolist()
            assert plain["scores"][task] == scores.probabilities()[task].tolist()
        assert plain["milliseconds"].keys() == {"encode", "prefill", "decode"}
    output = tmp_path / "new" / "scores.json"
    done = run_here("score", tiny_bundle, "--input", requests_file, "--output", output, "--limit", 1)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads(output.read_text())["requests"][0]["logits"] == found["requests"][0]["logits"]
    before = listing(tmp_path)
    line = error_line(run_here("score", tiny_bundle, "--input", requests_file, "--output", output), 2)
    assert line == f"{output} exists already; name another path or remove it"
    assert listing(tmp_path) == before


def test_score_a_log_folder(run_here: Command, tiny_bundle: Path, tmp_path: Path) -> None:
    logs = generate(users=4, requests_per_user=3, candidates_per_request=5, seed=1, schema=preset("tiny").schema)
    write_logs(logs, tmp_path / "logs")
    done = run_here("score", tiny_bundle, "--input", tmp_path / "logs", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = one_object(done.stdout)["requests"]
    assert len(found) == 12
    assert {len(plain["logits"]["ctr"]) for plain in found} == {5}
    ranker = Ranker.open(tiny_bundle)
    shown, events = logs.impressions, logs.events
    for plain in found[::4]:
        rows = np.flatnonzero(shown.request_id == int(plain["request"]))
        user, now = shown.user_id[rows[0]], shown.timestamp[rows[0]]
        assert plain["user"] == str(user)
        known = np.flatnonzero((events.user_id == user) & (events.timestamp < now))
        known = known[np.argsort(events.timestamp[known], kind="stable")]
        history = {name: column[known] for name, column in events.features.items()}
        history |= {"behaviour": events.behaviour[known], "timestamp": events.timestamp[known]}
        scores = ranker.rank(
            history=history,
            profile={name: column[rows[0]] for name, column in shown.user.items()},
            candidates={name: column[rows] for name, column in shown.candidate.items()},
        )
        for task in ("ctr", "cvr"):
            assert plain["logits"][task] == scores.logits[task].tolist()
    done = run_here("score", tiny_bundle, "--input", tmp_path / "logs", "--limit", 5, "--json")
    assert len(one_object(done.stdout)["requests"]) == 5


def test_score_keeps_states_where_asked(run_here: Command, tiny_bundle: Path, tmp_path: Path) -> None:
    schema = preset("tiny").schema
    whole = [request_of(schema, events=63, candidates=4, seed=user) for user in range(3)]
    visits = [(user, events) for events in (20, 20, 31) for user in range(3)]
    requests = [first_events(whole[user], events, user=f"u{user}") for user, events in visits]
    write_requests(tmp_path / "requests.json", requests)
    given = ("score", tiny_bundle, "--input", tmp_path / "requests.json", "--json")
    plain = one_object(run_here(*given).stdout)["requests"]
    assert {found["result"] for found in plain} == {"prefill"}
    for more in ((), ("--offload", tmp_path, "--offload-memory", "1MB", "--ttl", "100", "--reuse", "stale")):
        memory = "240KB" if more else "2MB"  # two users, one of them at work; or all
        done = run_here(*given, "--state-memory", memory, *more)
        assert (done.returncode, done.stderr) == (0, "")
        kept = one_object(done.stdout)["requests"]
        assert [found["result"] for found in kept] == ["prefill"] * 3 + ["reuse"] * 3 + ["append"] * 3
        for a, b in zip(kept, plain, strict=True):
            np.testing.assert_allclose(a["logits"]["ctr"], b["logits"]["ctr"], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ttl", "5"], "--ttl is about kept states; give --state-memory as well, such as 4GiB"),
        (["--offload-memory", "1GB"], "--offload-memory is about kept states; give --state-memory as well"),
        (["--reuse", "exact"], "--reuse is about kept states; give --state-memory as well"),
        (["--state-memory", "lots"], "--state-memory: 'lots' is not a size; give a number with B, KB"),
        (["--state-memory", "100KB"], "holds 0 users of 114192 bytes; give at least 228384"),
        (["--state-memory", "1MB", "--offload-memory", "1GB"], "--offload-memory its bytes; give both or neither"),
        (["--state-memory", "1MB", "--offload", "x"], "--offload names a folder and --offload-memory its bytes"),
        (["--state-memory", "1MB", "--reuse", "never"], "'never' is not one of 'exact', 'stale'"),
        (["--state-memory", "1MB", "--ttl", "0"], "--ttl is 0.0; it must be above 0"),
    ],
)
def test_wrong_cache_options_get_one_line(
    options: list[str], words: str, run_here: Command, tiny_bundle: Path, requests_file: Path
) -> None:
    line = error_line(run_here("score", tiny_bundle, "--input", requests_file, *options), 2)
    assert words in line


def test_doctor(run_cli: Command) -> None:
    done = run_cli("doctor", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = one_object(done.stdout)
    assert found["packages"]["numpy"] == np.__version__
    assert found["packages"]["onnxruntime"] or found["packages"]["onnxruntime-gpu"]
    assert found["missing"]["serve onnx bundles"] == found["missing"]["export to onnx"] == []
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    table = run_cli("doctor")
    assert table.returncode == 0
    assert "export to onnx" in table.stdout
    assert "ready" in table.stdout
