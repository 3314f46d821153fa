"""Checks the reference stack in float64 against golden cases: `python -m parity_tests.golden FILE…`.

Prints the largest relative (Frobenius) error of each file, exits 1 where one is beyond the bound, 2 where a file cannot
be read. `golden_cases/README.md` documents the format.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from onetrans.features.windows import Pyramid
from onetrans.model.stack import Segment, Stack, StackConfig, layer_windows

BOUND = 1e-10  # float64 round-off over a few layers, with four digits to spare


def load_stack(case: Mapping[str, np.ndarray]) -> Stack:
    """The float64 stack that a case describes, with its weights."""
    raw = json.loads(str(case["config"]))
    config = StackConfig(
        d=raw["d"],
        heads=raw["heads"],
        l_ns=raw["l_ns"],
        user_tokens=0,
        ffn_ratio=raw["ffn_ratio"],
        activation=raw["activation"],
        gated=False,
        bias=False,
        norm_gain="shared",
        output_projection="mixed",
        eps=raw["eps"],
        pyramid=Pyramid(keep=tuple(raw["keep"]), max_history=raw["max_history"], chunk=raw["append_chunk"]),
    )
    stack = Stack(config).double()
    for i, block in enumerate(stack.blocks):
        w = {key.split(".", 1)[1]: torch.from_numpy(case[key]) for key in case if key.startswith(f"layer{i}.")}
        block.load_state_dict(
            {
                "wq_s": w["wq_s"][None],
                "wkv_s": torch.cat([w["wk_s"], w["wv_s"]], dim=-1)[None],
                "wo_s": w["wo_s"][None],
                "w1_s": w["w1_s"][None],
                "w2_s": w["w2_s"][None],
                "wqkv_ns": torch.cat([w["wq_ns"], w["wk_ns"], w["wv_ns"]], dim=-1),
                "wo_ns": w["wo_ns"],
                "w1_ns": w["w1_ns"],
                "w2_ns": w["w2_ns"],
                "norm1": w["norm1"],
                "norm2": w["norm2"],
            }
        )
    return stack.eval()


def run(stack: Stack, case: Mapping[str, np.ndarray], lengths: list[int]) -> tuple[torch.Tensor, list[list[Segment]]]:
    """One pass over all `lengths` as one ragged batch: outputs [U, C, L_NS, D], and states by user and layer."""
    c = stack.config
    starts = [c.pyramid.starts(n)[0] for n in lengths]
    widest = max(1, *(n - s for n, s in zip(lengths, starts, strict=True)))
    s = torch.full((len(lengths), widest, c.d), 3.0, dtype=torch.float64)  # padding must not matter
    for u, (n, start) in enumerate(zip(lengths, starts, strict=True)):
        s[u, : n - start] = torch.from_numpy(case["s_tokens"][start:n])
    ns = torch.from_numpy(case["ns_tokens"])
    C = ns.shape[0]
    candidate = ns.permute(1, 0, 2)[:, None].expand(-1, len(lengths), -1, -1).reshape(c.l_ns, len(lengths) * C, c.d)
    start_U = torch.tensor(starts)
    length_U = torch.tensor([n - s for n, s in zip(lengths, starts, strict=True)])
    captured: list[list[torch.Tensor]] = [[], []]
    originals = [block.history_keys for block in stack.blocks]

    def spy(block_keys):
        def keys(x):
            k, v = block_keys(x)
            captured[0].append(k)
            captured[1].append(v)
            return k, v

        return keys

    for block, original in zip(stack.blocks, originals, strict=True):
        block.history_keys = spy(original)
    with torch.no_grad():
        _, out = stack(s, None, candidate, start_U, length_U)
    for block in stack.blocks:
        del block.history_keys
    new_length = layer_windows(c, start_U, length_U).new_length
    states = [
        [Segment(k[u, :n], v[u, :n], n) for k, v, n in zip(*captured, new_length[u], strict=True)]
        for u in range(len(lengths))
    ]
    return out.view(c.l_ns, len(lengths), C, c.d).permute(1, 2, 0, 3), states


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Frobenius error relative to the expected norm; infinite where shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    norm = float(np.linalg.norm(expected))
    error = float(np.linalg.norm(found - expected))
    return error / norm if norm else error


def compare(case: Mapping[str, np.ndarray]) -> Iterator[tuple[str, float]]:
    """Every array of a case that has an expected value, with its error."""
    lengths = [int(n) for n in case["lengths"]]
    stack = load_stack(case)
    out, states = run(stack, case, lengths)
    for u, n in enumerate(lengths):
        yield f"out.{n}", relative(out[u].numpy(), case[f"out.{n}"])
        for i, segment in enumerate(states[u]):
            for kind, value in (("k", segment.k), ("v", segment.v)):
                name = f"{kind}.{n}.{i}"
                if name in case:
                    yield name, relative(value.flatten(1).numpy(), case[name])


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m parity_tests.golden", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    status = 0
    for path in parser.parse_args(arguments).files:
        try:
            with np.load(path) as loaded:
                errors = dict(compare({name: loaded[name] for name in loaded.files}))
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            print(f"{path}: not a golden case: {error}", file=sys.stderr)
            return 2
        name = max(errors, key=errors.__getitem__)
        passed = errors[name] <= BOUND
        print(
            f"{path.name}: {len(errors)} arrays, largest relative error {errors[name]:.2e} at {name}"
            f"{'' if passed else f', beyond {BOUND:.0e}'}"
        )
        status = status if passed else 1
    return status


if __name__ == "__main__":
    sys.exit(main())
