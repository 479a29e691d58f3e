"""The GPU bench as Markdown and a roofline plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]
WAYS = ("ours", "w4a8", "w8a8", "bf16", "torch int4", "gemlite")
# bytes a second (measured copies where known) and bf16 FLOP a second
MACHINES = {"sm_80": (1.9e12, 250e12), "sm_90": (4.3e12, 790e12), "sm_100": (8.0e12, 2000e12)}


def write_report(report: Row, out: Path) -> None:
    """OUT/gpu.md, and OUT/roofline.png when there are times."""
    tables = [correctness_table(report), layer_table(report), decode_table(report)]
    head = f"{report['machine']}\n\n`{report['command']}`\n"
    parts = [head, *tables, attention_table(report)]
    (out / "gpu.md").write_text("\n".join(parts), encoding="utf-8")
    points = roofline_points(report)
    if points:
        plot(points, report["machine"]["arch"], out / "roofline.png")


def chosen(report: Row, prefix: str) -> dict[str, Row]:
    """Parts whose names start so, without the prefix."""
    found = report["parts"].items()
    return {name.removeprefix(prefix): row for name, row in found if name.startswith(prefix)}


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, or nothing without lines."""
    if not lines:
        return ""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def correctness_table(report: Row) -> str:
    lines = []
    for name, row in chosen(report, "correctness/").items():
        worst = max(row.get("errors", {"": 0.0}).values())
        lines.append([name, f"{worst:.1e}", "yes" if row["ok"] else "**NO**"])
    return table(["op", "largest relative error", "right"], lines)


def layer_table(report: Row) -> str:
    """Microseconds; for ours the ratio to bf16 and the share of the floor."""
    floors = MACHINES.get(report["machine"]["arch"])
    lines = []
    for name, row in chosen(report, "layers/").items():
        ours, dense = row.get("ours"), row.get("bf16")
        ratio = dense / ours if ours and dense else None
        share = 100 * floor_us(row, floors) / ours if ours and floors else None
        times = [number(row.get(way)) for way in WAYS]
        lines.append([name, *times, number(ratio, 2), number(share, 0)])
    return table(["layer/M, us", *WAYS, "bf16 / ours", "% of floor"], lines)


def floor_us(row: Row, floors: tuple[float, float]) -> float:
    """The longer of reading the weight and multiplying."""
    n, k = row["shape"]
    read = row["weight_bytes"] / floors[0]
    return 1e6 * max(read, 2.0 * n * k * row["rows"] / floors[1])


def decode_table(report: Row) -> str:
    lines = []
    for name, row in chosen(report, "decode/").items():
        ours, dense = row.get("W4"), row.get("bf16")
        ratio = dense / ours if ours and dense else None
        lines.append([name, number(ours), number(dense), number(ratio, 2)])
    return table(["batch, us a step", "W4", "bf16", "bf16 / W4"], lines)


def attention_table(report: Row) -> str:
    kinds = ("bf16", "e4m3", "int8", "int4")
    lines = []
    for name, row in chosen(report, "attention/").items():
        lines.append([name, *(number(row.get(kind)) for kind in kinds)])
    return table(["context, us", *kinds], lines)


def roofline_points(report: Row) -> list[tuple[str, float, float]]:
    """(way, FLOP a byte of weight, FLOP a second) of every timed layer."""
    points = []
    for row in chosen(report, "layers/").values():
        n, k = row["shape"]
        flops = 2.0 * n * k * row["rows"]
        for way, nbytes in (("ours", row["weight_bytes"]), ("bf16", 2 * n * k)):
            if row.get(way):
                points.append((way, flops / nbytes, flops / (row[way] * 1e-6)))
    return points


def plot(points: list[tuple[str, float, float]], arch: str, file: Path) -> None:
    """Reached FLOP rates over intensity, with the two floors where they are known."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    for way, marker in (("ours", "o"), ("bf16", "x")):
        mine = [(x, y) for name, x, y in points if name == way]
        if mine:
            axes.loglog(*zip(*mine, strict=True), marker, label=way)
    if arch in MACHINES:
        bandwidth, peak = MACHINES[arch]
        spread = sorted(x for _, x, _ in points)
        xs = [spread[0], peak / bandwidth, max(spread[-1], peak / bandwidth)]
        axes.loglog(xs, [min(peak, x * bandwidth) for x in xs], "-", label=f"{arch} floor")
    axes.set_xlabel("FLOP for each byte of weight")
    axes.set_ylabel("FLOP a second")
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
