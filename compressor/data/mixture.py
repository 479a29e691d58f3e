"""Rows of several sources in exact shares, spread evenly.

With weights w_i the n rows are shared out by largest remainders: floor(n w_i / sum w), and one row
more for the largest fractions that were cut off, the first of equals first. Row k of a source with
c rows stands at (k + 1/2) / c of the whole, so that any stretch of rows, the last ones that only
measure among them, holds the sources in about the same shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import torch

from compressor.data.rows import TokenRows
from compressor.errors import DataError
from compressor.recipe import DataConfig


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers that add up to `total` and follow the weights (largest remainders)."""
    exact = [total * Fraction(w) / sum(map(Fraction, weights)) for w in weights]
    counts = [math.floor(e) for e in exact]
    order = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def spread(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(source, row) pairs of all rows in the order in which they are laid out."""
    places = [(Fraction(2 * k + 1, 2 * c), i, k) for i, c in enumerate(counts) for k in range(c)]
    return [(i, k) for _, i, k in sorted(places)]


def mixture(
    config: DataConfig,
    read: Callable[[DataConfig], TokenRows],
    digest: Callable[[torch.Tensor], str],
) -> TokenRows:
    """Rows of `config.sources` by their weights.

    Args:
        config: of the whole; its `sources` are not empty.
        read: rows of one source.
        digest: of a token matrix.

    Raises:
        DataError: a source has too few rows for its share (CA03), or what `read` raises.
    """
    counts = apportion([s.weight for s in config.sources], config.num_samples)
    parts = [_read_part(config, index, count, read) for index, count in enumerate(counts) if count]
    order = spread([len(p.tokens) for p in parts])
    tokens = torch.stack([parts[i].tokens[k] for i, k in order])
    places = [parts[i].positions for i, _ in order]
    positions = [p[k] for p, (_, k) in zip(places, order, strict=True) if p is not None]
    unused = [s.source for s, c in zip(config.sources, counts, strict=True) if not c]
    notes = [f"{_shown(name)}: its weight is too small for a single row" for name in unused]
    notes += [f"{_shown(p.sources[0].source)}: {note}" for p in parts for note in p.notes]
    return TokenRows(
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        digest(tokens),
        tuple(notes),
        sum(p.num_documents for p in parts),
        torch.stack(positions) if positions else None,
        tuple(facts for p in parts for facts in p.sources),
    )


def _shown(source: str) -> str:
    """A source without its folder: notes are published with the artifact."""
    return Path(source).name if Path(source).expanduser().is_file() else source


def _read_part(
    config: DataConfig, index: int, count: int, read: Callable[[DataConfig], TokenRows]
) -> TokenRows:
    source = config.sources[index]
    changes = {"source": source.source, "split": source.split, "text_column": source.text_column}
    part = config.model_copy(update=changes | {"num_samples": count, "sources": []})
    rows = read(part)
    if len(rows.tokens) < count:
        raise DataError(
            f"{source.source} gives {len(rows.tokens)} of the {count} rows of its share",
            code="CA03",
            where=config.where(f"sources.{index}"),
            why="; ".join(rows.notes[:1]),
            fix="lower its weight or num_samples, use packing: packed, or give more text",
        )
    return replace(rows, sources=tuple(replace(s, source=source.source) for s in rows.sources))
