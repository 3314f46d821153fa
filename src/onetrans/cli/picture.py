"""Draws a bundle's split as SVG: prefill's pyramid, the cut with its tensors, and decode."""

from __future__ import annotations

from html import escape

from onetrans.runtime.manifest import Manifest
from onetrans.spec import TensorSpec

ROW = 46
TOP = 118
USER, CANDIDATE, INK, PAPER, FAINT = "#2f6f9f", "#b3541e", "#1f2933", "#ffffff", "#7b8794"


def draw_split(manifest: Manifest) -> str:
    """The picture; every number in it is the manifest's."""
    layers = manifest.pyramid.layers
    height = TOP + (layers + 1) * ROW + 150
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1160 {height}" width="1160" height="{height}"'
        f' font-family="Helvetica, Arial, sans-serif" font-size="13" fill="{INK}">',
        f'<rect width="1160" height="{height}" fill="{PAPER}"/>',
        _text(24, 34, f"{manifest.name}: one forward, split by scope", size=19, weight="bold"),
        _text(24, 56, _summary(manifest), fill=FAINT),
        _text(24, 90, "prefill: once per user", size=15, weight="bold", fill=USER),
        _text(470, 90, "state: the cut", size=15, weight="bold"),
        _text(806, 90, "decode: per candidate", size=15, weight="bold", fill=CANDIDATE),
    ]
    inputs = {name: graph.inputs for name, graph in manifest.graphs.items()}
    parts += _box(24, TOP, 400, 34, USER, f"S-tokens of {_listed(inputs['prefill'], 'event_')}")
    ns = f"{manifest.description['candidate_tokens']}: {_listed(inputs['decode'], 'candidate_')}"
    parts += _box(806, TOP, 330, 34, CANDIDATE, ns)
    parts += _request_row(manifest)
    for layer in range(layers):
        parts += _layer_row(manifest, layer)
    bottom = TOP + (layers + 1) * ROW
    parts += _box(806, bottom, 330, 34, CANDIDATE, "heads: " + ", ".join(manifest.tasks) + " logits [U, C]")
    parts.append(f'<line x1="760" y1="100" x2="760" y2="{bottom + 44}" stroke="{INK}" stroke-dasharray="6 5"/>')
    parts += _footer(manifest, bottom + 70)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _summary(manifest: Manifest) -> str:
    w = manifest.pyramid
    return (
        f"{w.layers} layers, {manifest.description['size']}, {manifest.precision};"
        f" windows anchored every {w.chunk} events; state {_size(manifest.bytes_per_user)} per user at most"
    )


def _layer_row(manifest: Manifest, layer: int) -> list[str]:
    w = manifest.pyramid
    y = TOP + (layer + 1) * ROW
    last = layer == w.layers - 1
    rows = manifest.description["candidate_rows"]
    tensors = [t for t in manifest.state if t.is_window and t.state and t.state.layer == layer]
    capacity = tensors[0].shape_per_user[0] if tensors else 0
    widest = max(t.shape_per_user[0] for t in manifest.state if t.is_window)
    width = 200 + 200 * capacity / widest
    bounds = w.capacities
    queries = "no S-query" if last else f"≤ {bounds[layer + 1]} queries"
    label = f"layer {layer + 1}: ≤ {capacity} keys, {queries}"
    parts = _box(24 + (400 - width) / 2, y, width, 34, USER, label, filled=False)
    parts += _arrow(224 + width / 2, y + 17, 462)
    parts += [_text(470, y + 22, _tensors_label(tensors))]
    parts += _arrow(752, y + 17, 806, CANDIDATE)
    return [
        *parts,
        *_box(
            806,
            y,
            330,
            34,
            CANDIDATE,
            f"layer {layer + 1}: {rows} attend",
            filled=False,
        ),
    ]


def _request_row(manifest: Manifest) -> list[str]:
    names = [t.name for t in manifest.state if not t.is_window and not t.name.startswith("user_")]
    more = [t.name for t in manifest.state if not t.is_window and t.name.startswith("user_")]
    label = ", ".join(names) + (f" and {len(more)} of the user's NS-tokens" if more else "")
    return [*_arrow(424, TOP + 17, 462), _text(470, TOP + 22, label), *_arrow(752, TOP + 17, 806, CANDIDATE)]


def _tensors_label(tensors: list[TensorSpec]) -> str:
    if not tensors:
        return ""
    dims = ", ".join(str(dim) for dim in tensors[0].dims)
    size = sum(t.bytes_per_user for t in tensors)
    return f"{', '.join(t.name for t in tensors)} [{dims}] {_size(size)}"


def _footer(manifest: Manifest, y: float) -> list[str]:
    split = manifest.split
    nodes = split["nodes"]
    lines = [
        f"{nodes['user']} user-scope and {nodes['candidate']} candidate-scope computations;"
        f" {len(split['folded'])} constants folded at export",
        f"{len(split['dead'])} dead computations removed (S-queries of the top layer),"
        f" {len(split['dead_weights'])} weights with them",
        f"partial products of linear(concat(user, candidate)): {len(split['partial_products'])}"
        + ("; append graph: the same forward on a non-empty state" if manifest.can_append else "; no append graph"),
    ]
    return [_text(24, y + 20 * i, line, fill=FAINT) for i, line in enumerate(lines)]


def _listed(specs: tuple[TensorSpec, ...], prefix: str) -> str:
    names = [spec.name.removeprefix(prefix) for spec in specs if spec.name.startswith(prefix)]
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _text(x: float, y: float, text: str, size: int = 13, weight: str = "normal", fill: str = INK) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{fill}">{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, color: str, label: str, filled: bool = True) -> list[str]:
    fill, ink = (color, PAPER) if filled else (PAPER, INK)
    return [
        f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" rx="5" fill="{fill}" stroke="{color}"'
        ' stroke-width="1.5"/>',
        f'<text x="{x + width / 2:.1f}" y="{y + height / 2 + 4.5}" text-anchor="middle" fill="{ink}">'
        f"{escape(label)}</text>",
    ]


def _arrow(x1: float, y: float, x2: float, color: str = USER) -> list[str]:
    return [
        f'<line x1="{x1}" y1="{y}" x2="{x2 - 7}" y2="{y}" stroke="{color}" stroke-width="1.5"/>',
        f'<path d="M {x2} {y} l -8 -4 v 8 z" fill="{color}"/>',
    ]
