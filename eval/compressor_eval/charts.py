"""The report's drawings: SVG text from matplotlib that takes its colours from the page.

Every drawing uses stand-in colours, which become CSS variables (`var(--accent)`), so that one
drawing suits the light and the dark scheme. Texts stay texts. Nothing points outside the page.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as VectorPath

INK, MUTED, GRID = "#010101", "#020202", "#030303"
ACCENT, SECOND, GOOD = "#040404", "#050505", "#060606"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", ACCENT: "accent", SECOND: "second",
              GOOD: "good"}  # fmt: skip
_WIDTH = 9.6  # inches; the page scales the drawing
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "compressor", "text.parse_math": False,
    "font.size": 10, "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": GRID,
    "xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": MUTED, "ytick.labelcolor": INK,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": GRID,
    "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip
_MAX_BARS = 32

Rows = Sequence[Mapping[str, Any]]


def label(text: object, limit: int = 40) -> str:
    """A name as plain ASCII of bounded length (fonts need no other glyphs)."""
    plain = str(text).encode("unicode_escape").decode("ascii")
    return plain if len(plain) <= limit else f"...{plain[3 - limit :]}"


def size_text(count: float) -> str:
    """Bytes for people: binary units, three digits."""
    sign, count = "−" if count < 0 else "", abs(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{sign}{count:.{0 if unit == 'B' else 2}f} {unit}"
        count /= 1024
    return f"{sign}{count:.2f} TiB"


@contextmanager
def _drawing(height: float) -> Iterator[tuple[Figure, Any, list[str]]]:
    """A figure with one pair of axes; its SVG is put into the list at the end."""
    result: list[str] = []
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.add_subplot(), result
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    result.append(_inline_svg(file.getvalue()))


def _inline_svg(text: str) -> str:
    """Cut what a page does not need (prolog, metadata, ids) and hand colours to CSS."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for stand_in, name in _VARIABLES.items():
        text = text.replace(stand_in, f"var(--{name})")
    return re.sub(r"\n\s*", "\n", text)


def waterfall(sizes: Rows) -> str:
    """Bytes from the original to the artifact, one step a component, largest saving first."""
    steps = sorted(sizes, key=lambda s: s["artifact_bytes"] - s["original_bytes"])
    if len(steps) > _MAX_BARS:
        steps = [*steps[: _MAX_BARS - 1], _sum_of(steps[_MAX_BARS - 1 :])]
    level = sum(s["original_bytes"] for s in steps)
    bars = [("original", 0.0, level, MUTED)]
    for step in steps:
        change = step["artifact_bytes"] - step["original_bytes"]
        bars.append((step["component"], level, change, GOOD if change <= 0 else SECOND))
        level += change
    bars.append(("artifact", 0.0, level, ACCENT))
    return _waterfall_bars(bars)


def _sum_of(steps: Rows) -> dict[str, Any]:
    total = {k: sum(s[k] for s in steps) for k in ("original_bytes", "artifact_bytes")}
    return {"component": f"{len(steps)} others", **total}


def _waterfall_bars(bars: list[tuple[str, float, float, str]]) -> str:
    top = max(bars[0][2], 1)
    with _drawing(0.6 + 0.3 * len(bars)) as (_, axes, result):
        for y, (name, start, change, colour) in enumerate(bars):
            axes.barh(y, change / top, left=start / top, color=colour, height=0.62)
            end = max(start, start + change) / top
            note = size_text(change) if change else "unchanged"
            note += f" ({change / top:.1%})" if name == "artifact" else ""
            axes.text(end + 0.008, y, note, va="center", fontsize=9)
        _name_rows(axes, [b[0] for b in bars])
        axes.set_xlim(0, 1.14)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
    return result[0]


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [label(n) for n in names])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.45, -0.6)


def bits_heat_map(layers: Rows) -> str:
    """Bits a weight: kinds of linears down, layers across; darker is wider."""
    kinds = list(dict.fromkeys(str(c["kind"]) for c in layers))[:_MAX_BARS]
    columns = sorted({int(c["layer"]) for c in layers})
    place = {n: x for x, n in enumerate(columns)}
    cells = [(place[int(c["layer"])], kinds.index(str(c["kind"])), float(c["bits"]))
             for c in layers if str(c["kind"]) in kinds]  # fmt: skip
    widest = max(bits for _, _, bits in cells)
    roomy = len(columns) <= 40
    with _drawing(0.7 + 0.34 * len(kinds)) as (_, axes, result):
        for bits in sorted({bits for _, _, bits in cells}):  # one path for all cells of a width
            path = _cells_path([(x, y) for x, y, b in cells if b == bits])
            shade = bits / widest * 0.75
            axes.add_patch(PathPatch(path, facecolor=ACCENT, alpha=shade, linewidth=0))
        for x, y, bits in cells if roomy else []:
            axes.text(x + 0.5, y, f"{bits:.3g}", ha="center", va="center", fontsize=8)
        _name_rows(axes, kinds)
        stride = max(1, math.ceil(len(columns) / 40))
        shown = columns[::stride]
        axes.set_xticks([place[n] + 0.5 for n in shown], [str(n) for n in shown])
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(0, max(len(columns), 6))
        axes.set_xlabel("layer" if roomy else f"layer (full colour = {widest:.3g} bits)")
        axes.spines[["left", "bottom"]].set_visible(False)
    return result[0]


def _cells_path(places: Sequence[tuple[int, int]]) -> VectorPath:
    """One path of a rectangle for each cell."""
    corners = ((0.03, -0.45), (0.97, -0.45), (0.97, 0.45), (0.03, 0.45))
    boxes = [VectorPath([(x + dx, y + dy) for dx, dy in (*corners, corners[0])], closed=True)
             for x, y in places]  # fmt: skip
    return VectorPath.make_compound_path(*boxes)


def sensitivity_bars(scores: Rows) -> str:
    """Damage done by compressing one unit alone, the most sensitive units first."""
    ranked = sorted(scores, key=lambda s: -s["score"])[:_MAX_BARS]
    with _drawing(0.75 + 0.24 * len(ranked)) as (_, axes, result):
        axes.barh(range(len(ranked)), [s["score"] for s in ranked], color=ACCENT, height=0.66)
        _name_rows(axes, [s["unit"] for s in ranked])
        end = max((s["score"] for s in ranked), default=1) or 1
        for y, s in enumerate(ranked):
            note = f"{s['score']:.3g}" + (f" · {label(s['scheme'])}" if s.get("scheme") else "")
            axes.text(s["score"] + 0.008 * end, y, note, va="center", fontsize=8.5)
        axes.set_xlim(0, end * 1.2)
        axes.set_xlabel("score (predicted rise of the loss, nats)")
        axes.grid(axis="x")
    return result[0]


def kl_histogram(comparison: Mapping[str, Any]) -> str:
    """Tokens by their KL divergence, logarithmic bins, with mean and 99th percentile."""
    edges, counts = comparison["kl_histogram"]["edges"], comparison["kl_histogram"]["counts"]
    edges = [edges[1] / 10**0.25, *edges[1:]]  # the first bin starts at zero
    total = sum(counts) or 1
    used = [i for i, c in enumerate(counts) if c] or [0]
    named = {"mean": comparison.get("kl_mean"), "p99": comparison.get("kl_p99")}
    marks = {name: value for name, value in named.items() if value}
    low = min([edges[used[0]], *marks.values()])
    high = max([edges[used[-1] + 1], *marks.values()])
    with _drawing(2.9) as (_, axes, result):
        widths = [(b - a) * 0.94 for a, b in itertools.pairwise(edges)]
        shares = [100 * c / total for c in counts]
        axes.bar(edges[:-1], shares, widths, align="edge", color=ACCENT, alpha=0.85)
        axes.set_xscale("log")
        axes.set_xlim(low / 1.5, high * 1.8)
        axes.set_ylim(0, max(shares) * 1.22)
        for name, value in marks.items():
            _mark(axes, value, name)
        axes.set_xlabel("KL divergence of one token (nats)")
        axes.set_ylabel("% of tokens")
        axes.minorticks_off()
        axes.tick_params(axis="y", labelcolor=MUTED)
        _plain_powers(axes, low, high)
        axes.grid(axis="y")
    return result[0]


def _plain_powers(axes: Any, low: float, high: float) -> None:
    """Powers of ten as text without superscripts (1e-3)."""
    first, last = math.ceil(math.log10(low) - 0.1), math.floor(math.log10(high) + 0.1)
    powers = range(first, last + 1) or range(first, first + 1)
    axes.set_xticks([10.0**p for p in powers], [f"1e{p}" if p else "1" for p in powers])


def _mark(axes: Any, value: float, name: str) -> None:
    axes.axvline(value, color=SECOND, linewidth=1.4, linestyle=(0, (4, 3)))
    place = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
    axes.annotate(
        f"{name} {value:.3g}", (value, 0.95), xytext=(4, 0), fontsize=9, va="top", **place
    )


def front(data: Mapping[str, Any]) -> str:
    """Bytes against KL: the predicted front, uniform formats, and the mixtures that were measured.

    Rows have bytes, predicted_kl and measured_kl (may be None or missing); points without damage
    have no place on a logarithmic axis.
    """
    line = [(p["bytes"], p["predicted_kl"]) for p in data["points"] if p["predicted_kl"]]
    uniform = [(p["bytes"], p.get("measured_kl") or p["predicted_kl"], p["name"])
               for p in data["uniform"] if p.get("measured_kl") or p["predicted_kl"]]  # fmt: skip
    measured = [(p["bytes"], p["measured_kl"], p["name"])
                for p in data["measured"] if p.get("measured_kl")]  # fmt: skip
    if not line or not measured:
        return ""
    with _drawing(3.6) as (_, axes, result):
        axes.plot(*zip(*line, strict=True), color=MUTED, linewidth=1.6, label="predicted front")
        if uniform:
            xs, ys, _ = zip(*uniform, strict=True)
            axes.scatter(xs, ys, marker="s", s=22, color=SECOND, label="one format")
            for x, y, name in uniform:
                axes.annotate(label(name, 20), (x, y), xytext=(6, 3), fontsize=8.5,
                              textcoords="offset points")  # fmt: skip
        rest = [(x, y) for x, y, name in measured if name != data.get("kept")]
        if rest:
            axes.scatter(*zip(*rest, strict=True), marker="o", s=20, color=GOOD, label="measured")
        chosen = [(x, y) for x, y, name in measured if name == data.get("kept")]
        if chosen:
            axes.scatter(*zip(*chosen, strict=True), marker="D", s=46, color=ACCENT, zorder=3,
                         label="this artifact, measured")  # fmt: skip
        _front_axes(axes, [y for _, y in line] + [y for _, y, _ in uniform + measured], data)
    return result[0]


def _front_axes(axes: Any, values: Sequence[float], data: Mapping[str, Any]) -> None:
    axes.set_yscale("log")
    axes.minorticks_off()
    low, high = min(values), max(values)
    axes.set_ylim(low / 1.6, high * 1.6)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = [10.0**p for p in range(first, last + 1) if low / 1.6 <= 10.0**p <= high * 1.6]
    axes.set_yticks(powers, [f"{p:g}" for p in powers])
    ticks = axes.get_xticks()
    most = max(1e3, *(p["bytes"] for p in data["points"]))
    shown = [t for t in ticks if 0 < t <= 1.02 * most]
    scale, unit = next((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if most >= s / 2)
    axes.set_xticks(shown, [f"{t / scale:g} {unit}" for t in shown])
    axes.tick_params(axis="y", labelcolor=MUTED)
    axes.set_xlabel("bytes of the quantized layers")
    axes.set_ylabel("mean KL divergence (nats)")
    axes.grid(axis="both")
    axes.legend(loc="upper right")


def predictions(rows: Rows) -> str:
    """Predicted against measured KL of the plan and of its alternatives, logarithmic."""
    known = [r for r in rows if r.get("predicted_kl") or r.get("measured_kl")][:_MAX_BARS]
    if not known:
        return ""
    with _drawing(1.15 + 0.42 * len(known)) as (_, axes, result):
        styles = (("predicted_kl", "o", MUTED), ("measured_kl", "D", ACCENT))
        for y, row in enumerate(known):
            ends = [row[k] for k, _, _ in styles if row.get(k)]
            axes.plot(ends, [y] * len(ends), color=GRID, linewidth=2, zorder=1)
        for key, marker, colour in styles:
            points = [(r[key], y) for y, r in enumerate(known) if r.get(key)]
            if points:
                name = key.removesuffix("_kl")
                axes.scatter(*zip(*points, strict=True), marker=marker, color=colour, label=name)
        names = [f"{label(r['label'], 30)}{_bits_note(r)}" for r in known]
        _name_rows(axes, names)
        axes.set_xscale("log")
        axes.minorticks_off()
        values = [r[k] for r in known for k, _, _ in styles if r.get(k)]
        axes.set_xlim(min(values) / 1.6, max(values) * 1.6)
        _nice_ticks(axes, min(values), max(values))
        axes.set_xlabel("mean KL divergence (nats)")
        axes.grid(axis="x")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)
    return result[0]


def _bits_note(row: Mapping[str, Any]) -> str:
    return f"  ({row['average_bits']:.2f} bits)" if row.get("average_bits") else ""


def _nice_ticks(axes: Any, low: float, high: float) -> None:
    """A few round numbers of each decade inside the range."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**d for d in decades for m in (1, 1.5, 2, 3, 5, 7)]
    inside = [t for t in ticks if low / 1.6 <= t <= high * 1.6]
    axes.set_xticks(inside, [f"{t:.3g}" for t in inside])
