"""The instruction budget of every format and tier of M, as counted in compiled code.

    python -m compressor_kernels.budget --arch sm_90 --out budget.json --table budget.md

Each cell of the table is `count/limit form`: issue slots one scheduler spends on a tile of 128
rows, and how many fit into the time the bytes of the tile take to arrive (`aot.ISSUE_LIMIT`), or,
marked with p, into the longer time its products take on the tensor cores. A count marked with m is
the clocks of the older matrix instructions, where these take longer than the slots.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compressor_kernels.aot import TARGETS, Job, run_job, write_report
from compressor_kernels.sources import Variant, usual_config

TIERS = (8, 16, 32, 64)
FORMATS: dict[str, Variant] = {
    "int4 g128": Variant(),
    "int4 g128, zero points": Variant(has_zeros=True),
    "int4 g64": Variant(group_size=64),
    "int4 g32": Variant(group_size=32),
    "int4 row": Variant(group_size=-1),
    "int4 g128, fp16": Variant(dtype="fp16"),
    "int8 row": Variant("int8", -1),
    "int8 g128": Variant("int8"),
    "int3 g128": Variant("int3"),
    "int2 g128": Variant("int2"),
    "e4m3 row": Variant("e4m3", -1),
    "NVFP4": Variant("e2m1", 16, scale_kind="e5m3"),
    "MXFP4": Variant("e2m1", 32, scale_kind="e8m0"),
}


def tier_job(arch: str, name: str, rows: int) -> Job:
    """The kernel that `tuning.heuristic` uses for a format and a tier of M, without split-K."""
    variant = FORMATS[name]
    return Job(arch, asdict(variant), asdict(usual_config(arch, variant, rows)))


def tiers(arch: str) -> tuple[int, ...]:
    """Tiers of M; matrix instructions of AMD need 16 rows."""
    return TIERS[1:] if arch.startswith("gfx") else TIERS


def compile_matrix(archs: Sequence[str], names: Sequence[str]) -> list[dict[str, Any]]:
    """Facts of every format at every tier; each row says which in `format` and `rows`."""
    return [
        run_job(tier_job(arch, name, rows), None) | {"format": name, "rows": rows}
        for arch in archs
        for name in names
        for rows in tiers(arch)
    ]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table for each architecture; cells over the limit are bold, spills are named."""
    parts = []
    for arch in dict.fromkeys(row["arch"] for row in rows):
        mine = [row for row in rows if row["arch"] == arch]
        known = dict.fromkeys(row["rows"] for row in mine)
        lines = [f"| {arch} | " + " | ".join(f"{m} rows" for m in known) + " |"]
        lines.append("|---|" + "---|" * len(known))
        for name in dict.fromkeys(row["format"] for row in mine):
            cells = {row["rows"]: _cell(row) for row in mine if row["format"] == name}
            lines.append(f"| {name} | " + " | ".join(cells[m] for m in known) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _cell(row: dict[str, Any]) -> str:
    slots, clocks, limit = row["issue_slots"], row["matrix_clocks"], row["issue_limit"]
    count = max(slots, clocks)
    text = f"{count}{'m' * (clocks > slots)}/{limit}{'p' * (row['limited_by'] == 'products')}"
    text = f"**{text}**" if count > limit else text
    spilled = f", spills {row['spills']}" if row["spills"] else ""
    return f"{text} {row['config']['form']}{spilled}"


def main(arguments: list[str] | None = None) -> None:
    """Compile the matrix, write facts and table."""
    parser = argparse.ArgumentParser(description="instruction budget of every format and tier")
    parser.add_argument("--arch", action="append", choices=sorted(TARGETS), required=True)
    parser.add_argument("--format", action="append", choices=sorted(FORMATS), default=[])
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the facts")
    parser.add_argument("--table", type=Path, help="Markdown file for the table")
    options = parser.parse_args(arguments)
    rows = compile_matrix(options.arch, options.format or list(FORMATS))
    write_report(rows, options.out)
    if options.table is not None:
        options.table.write_text(markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
