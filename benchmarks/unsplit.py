"""The baseline without a split: the model's one forward, eager in PyTorch or whole in ONNX Runtime.

Both need torch, so each runs in a process of its own:
`python -m benchmarks.unsplit lower` reads {"preset", "seed", "output"} on stdin, writes an ONNX file, prints {"bytes"};
`python -m benchmarks.unsplit eager` reads a line {"preset", "seed", "inputs", "threads"}, `inputs` being an .npz of one
user and one candidate, prints the logits, and then answers each line with one forward and its seconds, so that it can
be timed in turn with what another process runs.
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
from onetrans.export.config import ExportConfig
from onetrans.export.inputs import capture_model
from onetrans.export.split import prepare
from onetrans.export.targets.onnx.target import lower
from onetrans.model.checkpoint import random_model
from onetrans.model.presets import preset
from onetrans.spec import TensorSpec


def eager(asked: dict[str, Any]) -> None:
    """Runs the reference forward, float32, whenever a line comes in."""
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
    model = random_model(preset(asked["preset"]), asked["seed"])
    c, config = model.config, ExportConfig()
    program, _ = prepare(capture_model(model, config)[0])
    outputs = [TensorSpec(name=t, dtype="float32", dims=("U", "C"), scope="candidate") for t in c.tasks]
    made = lower(program, outputs, "unsplit")
    output = Path(asked["output"])
    unfinished = output.with_suffix(".unfinished")
    unfinished.write_bytes(ir.to_proto(made).SerializeToString())
    unfinished.rename(output)
    print(json.dumps({"bytes": output.stat().st_size}))


def main() -> None:
    """Runs what the first argument names."""
    {"eager": eager, "lower": lower_whole}[sys.argv[1]](json.loads(sys.stdin.readline()))


if __name__ == "__main__":
    main()
