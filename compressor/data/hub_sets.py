"""Rows of a named dataset through the `datasets` library: streamed, or from its cache offline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from compressor.errors import DataError, HubError, Where, printable


def hub_rows(source: str, split: str | None) -> Iterator[tuple[Where, Any]]:
    """Rows of `name` or `name:subset`, split `split` or "train".

    Online the rows are streamed, so that a large dataset costs only what is read; with
    HF_HUB_OFFLINE or HF_DATASETS_OFFLINE set, they come from the local cache.

    Raises:
        DataError: CA01 (no such dataset, subset or split).
        HubError: CA16 (neither reachable nor cached).
    """
    rows = _open(source, split or "train")
    number = 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            raise _refused(source, split or "train", error) from error
        if row is None:
            return
        number += 1
        yield Where(file=printable(source), key=f"row {number}"), row


def _open(source: str, split: str) -> Iterator[Any]:
    import datasets

    name, _, subset = source.partition(":")
    try:
        streaming = not datasets.config.HF_HUB_OFFLINE
        rows = datasets.load_dataset(name, subset or None, split=split, streaming=streaming)
    except Exception as error:
        raise _refused(source, split, error) from error
    return iter(rows)


def _refused(source: str, split: str, error: Exception) -> DataError | HubError:
    """Tell "there is no such dataset" (5) from "the network or the cache lacks it" (9)."""
    import datasets

    where = Where(file=printable(source), key=f"split {split}")
    why = f"{error.__class__.__name__}: {printable(str(error), 200)}"
    offline = bool(datasets.config.HF_HUB_OFFLINE)
    network = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    if offline or network:
        return HubError(
            "the dataset is not in the cache and the network is off"
            if offline
            else "the dataset could not be fetched",
            code="CA16",
            where=where,
            why=f"{why}. Cache tried: {datasets.config.HF_DATASETS_CACHE}",
            fix=f"on a machine with network: hf download --repo-type dataset "
            f"{printable(source.partition(':')[0])}",
        )
    return DataError(
        "no such dataset, subset or split",
        code="CA01",
        where=where,
        why=why,
        fix="give a file, NAME or NAME:SUBSET with its split, or: reference, reference-eval",
    )
