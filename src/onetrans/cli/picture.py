"""Draws a bundle's split as SVG: prefill's pyramid, the state with its tensors, and decode."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from onetrans.runtime.manifest import Manifest
from onetrans.spec import TensorSpec

WIDTH = 1200
TOP, INPUT, ROW, BOX = 112, 46, 46, 34  # where the inputs begin; their height; pitch and height of the layers' boxes
PREFILL, STATE, DECODE = (24, 440), (500, 296), (850, 326)  # left edge and width of each column
CUT = 823
CHARACTER = 7.1  # pixels of a character at most, in whichever font the viewer has
USER, CANDIDATE, INK, PAPER, FAINT = "#2f6f9f", "#b3541e", "#1f2933", "#ffffff", "#5f6b7a"


def draw_split(manifest: Manifest) -> str:
    """The picture; every number in it is the manifest's."""
    schema, state = manifest.schema, manifest.state
    most = (*manifest.pyramid.capacities[1:-1], 0)  # S-queries of each layer; those of the last would feed nothing
    bottom = _row(len(most))
    height = bottom + BOX + 150
    (left, width), (right, span) = PREFILL, DECODE
    half = (width - 12) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        f' font-family="Helvetica, Arial, sans-serif" font-size="13" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{height}" fill="{PAPER}"/>',
        _text(left, 34, f"{manifest.name}: one forward, split by scope", size=19, weight="bold"),
        _text(left, 56, _summary(manifest), fill=FAINT),
        _text(left, 96, "prefill: once per user", size=15, weight="bold", fill=USER),
        _text(STATE[0], 96, "state: kept per user", size=15, weight="bold"),
        _text(right, 96, "decode: per candidate", size=15, weight="bold", fill=CANDIDATE),
        *_cut(bottom + BOX + 14),
        *_input(left, half, USER, "history", ["behaviour", *(feature.name for feature in schema.event)]),
        *_input(left + half + 12, half, USER, "profile and context", [feature.name for feature in schema.user]),
        *_input(right, span, CANDIDATE, "candidates", [feature.name for feature in schema.candidate]),
        *_down(left + half / 2, TOP + INPUT, _row(0)),
        *_down(right + span / 2, TOP + INPUT, _row(0), CANDIDATE),
    ]
    others = [spec for spec in state if not spec.is_window]
    if others:
        parts += _state_box(TOP, INPUT, [_listed([spec.name for spec in others], 36), _size(_nbytes(others))])
        parts += _across(left + width, TOP + INPUT / 2)
    widest = max((_capacity(spec) for spec in state), default=1) or 1
    for layer, most_queries in enumerate(most):
        parts += _layer(layer, [spec for spec in state if _is_of(spec, layer)], most_queries, widest)
        parts += _down(right + span / 2, _row(layer) + BOX, _row(layer + 1), CANDIDATE)
        if layer + 1 < len(most):
            parts += _down(left + half / 2, _row(layer) + BOX, _row(layer + 1))
    heads = f"heads: {_listed(manifest.tasks, 28)} logits [U, C]"
    parts += _box(right, bottom, span, BOX, CANDIDATE, [heads], filled=True)
    return "\n".join([*parts, *_footer(manifest, bottom + BOX + 72), "</svg>"]) + "\n"


def _row(layer: int) -> int:
    return TOP + INPUT + 14 + layer * ROW


def _summary(manifest: Manifest) -> str:
    described = {"layers": str(manifest.pyramid.layers), **manifest.description}
    model = ", ".join(f"{name} {value}" for name, value in described.items())
    return (
        f"{model}, {manifest.precision}; windows move every {manifest.pyramid.chunk} events;"
        f" state of at most {_size(manifest.bytes_per_user)} per user"
    )


def _layer(layer: int, specs: Sequence[TensorSpec], most_queries: int, widest: int) -> list[str]:
    """One layer: what prefill computes of it, the keys and values that it leaves, and what decode reads."""
    (left, width), (right, span) = PREFILL, DECODE
    y = _row(layer)
    capacity = max(map(_capacity, specs), default=0)
    used = width * (0.58 + 0.42 * capacity / widest)  # left-aligned, as the tokens of a history are
    asked = f"≤ {most_queries} queries" if most_queries else "no query"
    names = ", ".join(spec.name for spec in specs)
    reads = f"candidates attend to {names}" if specs else "candidates attend to themselves"
    parts = _box(left, y, used, BOX, USER, [f"layer {layer + 1}: ≤ {capacity} keys, {asked}"])
    parts += _box(right, y, span, BOX, CANDIDATE, [f"layer {layer + 1}: {reads}"])
    if specs:
        label = f"{names} {shape_text(specs[0])} {_size(_nbytes(specs))}"
        parts += _state_box(y, BOX, [label])
        parts += _across(left + used, y + BOX / 2)
    return parts


def _input(x: float, width: float, color: str, title: str, names: Sequence[str]) -> list[str]:
    return _box(x, TOP, width, INPUT, color, [title, _listed(names, int(width / CHARACTER) - 1)], filled=True)


def _state_box(y: float, height: float, lines: Sequence[str]) -> list[str]:
    return _box(STATE[0], y, STATE[1], height, INK, lines)


def _across(start: float, y: float) -> list[str]:
    """Two arrows: from prefill to the state, and from the state over the cut to decode."""
    return [*_arrow(start, y, STATE[0]), *_arrow(STATE[0] + STATE[1], y, DECODE[0], CANDIDATE)]


def _cut(end: float) -> list[str]:
    """The dashed line between the scopes, and what it says."""
    return [
        f'<line x1="{CUT}" y1="82" x2="{CUT}" y2="{end}" stroke="{INK}" stroke-dasharray="6 5"/>',
        _text(CUT, end + 18, "the cut", weight="bold", anchor="middle"),
        _text(CUT - 34, end + 18, "user scope: known before any candidate", fill=USER, anchor="end"),
        _text(CUT + 34, end + 18, "candidate scope: needs a candidate", fill=CANDIDATE),
    ]


def _footer(manifest: Manifest, y: float) -> list[str]:
    split = manifest.split
    nodes = split["nodes"]
    append = "the same forward on a state that is not empty" if manifest.can_append else "none"
    dead, weights, folded = (len(split[part]) for part in ("dead", "dead_weights", "folded"))
    partial = len(split["partial_products"])
    lines = [
        f"{nodes['user']} user-scope and {nodes['candidate']} candidate-scope computations; {folded} constants folded",
        f"{dead} computations that feed no output removed, {weights} weights with them",
        f"partial products of linear(concat(user, candidate)): {partial}; append graph: {append}",
    ]
    return [_text(PREFILL[0], y + 20 * index, line, fill=FAINT) for index, line in enumerate(lines)]


def _listed(names: Sequence[str], most: int) -> str:
    """As many of the names as fit into so many characters, and how many more there are."""
    for count in range(len(names), 0, -1):
        rest = len(names) - count
        text = ", ".join(names[:count]) + (f" and {rest} more" if rest else "")
        if len(text) <= most or count == 1:
            return text
    return "none"


def shape_text(spec: TensorSpec) -> str:
    """A shape as text, such as `[U, L, 4, 64]`."""
    return f"[{', '.join(map(str, spec.dims))}]"


def _is_of(spec: TensorSpec, layer: int) -> bool:
    return spec.state is not None and spec.state.layer == layer


def _capacity(spec: TensorSpec) -> int:
    """Most tokens of a user; 0 for what has no window."""
    return spec.state.capacity if spec.state is not None else 0


def _nbytes(specs: Sequence[TensorSpec]) -> int:
    return sum(spec.bytes_per_user for spec in specs)


def _size(count: int) -> str:
    if count < 1e3:
        return f"{count} bytes"
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _text(
    x: float, y: float, text: str, size: int = 13, weight: str = "normal", fill: str = INK, anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="{fill}"'
        f' text-anchor="{anchor}">{escape(text)}</text>'
    )


def _box(
    x: float,
    y: float,
    width: float,
    height: float,
    color: str,
    lines: Sequence[str],
    *,
    filled: bool = False,
) -> list[str]:
    """A box with one or two lines; of two in a filled box, the first is its title."""
    fill, ink = (color, PAPER) if filled else (PAPER, INK)
    first = y + height / 2 + 4.5 - 8.5 * (len(lines) - 1)
    return [
        f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" rx="5" fill="{fill}" stroke="{color}"'
        ' stroke-width="1.5"/>',
        *(
            _text(
                x + width / 2,
                first + 17 * index,
                line,
                weight="bold" if filled and index < len(lines) - 1 else "normal",
                fill=ink,
                anchor="middle",
            )
            for index, line in enumerate(lines)
        ),
    ]


def _arrow(x1: float, y: float, x2: float, color: str = USER) -> list[str]:
    return [
        f'<line x1="{x1:.1f}" y1="{y:.1f}" x2="{x2 - 7:.1f}" y2="{y:.1f}" stroke="{color}" stroke-width="1.5"/>',
        f'<path d="M {x2:.1f} {y:.1f} l -8 -4 v 8 z" fill="{color}"/>',
    ]


def _down(x: float, y1: float, y2: float, color: str = USER) -> list[str]:
    return [
        f'<line x1="{x:.1f}" y1="{y1:.1f}" x2="{x:.1f}" y2="{y2 - 5:.1f}" stroke="{color}" stroke-width="1.5"/>',
        f'<path d="M {x:.1f} {y2:.1f} l -4 -7 h 8 z" fill="{color}"/>',
    ]
