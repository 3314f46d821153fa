"""The baseline without a split: the model's one forward, eager in PyTorch or whole in ONNX Runtime.

Both need torch, so each runs in a process of its own:
`python -m benchmarks.contestants.unsplit lower` reads {"preset", "seed", "output"} on stdin, writes an ONNX file and
prints {"bytes"}; `… eager` reads a line {"preset", "seed", "inputs", "threads"}, `inputs` being an .npz of one user and
one candidate, prints the logits, and then answers each line with one forward and its seconds, so that it can be timed
in turn with what another process runs.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxscript import ir

from onetrans.bench.run import quiet_collector
from onetrans.export.capture import capture_model
from onetrans.export.config import ExportConfig
from onetrans.export.models.base import adapt
from onetrans.export.split import prepare
from onetrans.export.targets.onnx.graph import lower
from onetrans.model.checkpoint import random_model
from onetrans.model.presets import preset


def eager(asked: dict[str, Any]) -> None:
    """Runs the model's forward, float32, whenever a line comes in."""
    torch.set_num_threads(asked["threads"])
    model = random_model(preset(asked["preset"]), asked["seed"])
    inputs = {name: torch.from_numpy(value) for name, value in np.load(asked["inputs"]).items()}
    user = {name: value for name, value in inputs.items() if not name.startswith("candidate_")}
    candidate = {name: value for name, value in inputs.items() if name not in user}
    with torch.inference_mode(), quiet_collector():
        logits = model(user, candidate)
        print(json.dumps({task: value.flatten().tolist() for task, value in logits.items()}), flush=True)
        for _ in sys.stdin:
            began = time.perf_counter()
            model(user, candidate)
            print(time.perf_counter() - began, flush=True)


def lower_whole(asked: dict[str, Any]) -> None:
    """Lowers the whole captured forward as the exporter lowers its parts: same passes, same operators."""
    model, config = adapt(random_model(preset(asked["preset"]), asked["seed"])), ExportConfig()
    bounds = model.bounds(max_users=config.max_users, max_candidates=config.max_candidates)
    program = prepare(capture_model(model, bounds)[0])[-1].program
    made = lower({"unsplit": program})["unsplit"].value
    output = Path(asked["output"])
    unfinished = output.with_suffix(".unfinished")
    unfinished.write_bytes(ir.to_proto(made).SerializeToString())
    unfinished.rename(output)
    print(json.dumps({"bytes": output.stat().st_size}))


if __name__ == "__main__":
    {"eager": eager, "lower": lower_whole}[sys.argv[1]](json.loads(sys.stdin.readline()))
