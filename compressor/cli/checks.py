"""`compress verify DIR` and `compress inspect DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compressor.cli import flags

if TYPE_CHECKING:
    from compressor.modeling.checkpoint import Checkpoint

Folder = Annotated[Path, typer.Argument(help="Folder of an artifact.")]

PACKED_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


def verify(path: Folder, as_json: flags.AsJson = False) -> None:
    """Reopen an artifact and check every byte against its manifest."""
    from compressor import console

    with console.session(as_json=as_json):
        from compressor.stages.verify import verify_artifact

        report = verify_artifact(path)
    if as_json:
        console.show_json({"verified": True, **report.as_json()})
    else:
        console.show_facts({"verified": path.name, **report.as_json()})


def inspect(
    path: Annotated[str, typer.Argument(help="Folder of a model or an artifact, or a hub id.")],
    as_json: flags.AsJson = False,
) -> None:
    """List the layers of a model folder: formats, shapes, bytes and bits a weight."""
    from compressor import console

    with console.session(as_json=as_json):
        from compressor.modeling.checkpoint import open_checkpoint
        from compressor.modeling.hub import resolve_model

        checkpoint = open_checkpoint(resolve_model(path).path)
        rows = layer_rows(checkpoint)
    total = {"layers": len(rows), "weight bytes": checkpoint.nbytes}
    if as_json:
        console.show_json({"rows": rows, "total": total})
    else:
        console.show_table(rows, title=checkpoint.path.name)
        console.show_facts(total)


def layer_rows(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """One row for every module that has tensors: format, shape, bytes and bits a weight."""
    parts: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        parts.setdefault(name.rpartition(".")[0], []).append(name)
    return [_row(checkpoint, module, names) for module, names in sorted(parts.items())]


def _row(checkpoint: Checkpoint, module: str, names: list[str]) -> dict[str, Any]:
    infos = {name.rpartition(".")[2]: checkpoint.tensors[name] for name in names}
    packed = infos.get("weight_packed")
    if packed is not None and f"{module}.weight_shape" in checkpoint.tensors:
        shape = [int(n) for n in checkpoint.read(f"{module}.weight_shape").tolist()]
        nbytes = sum(infos[part].nbytes for part in PACKED_PARTS if part in infos)
        kind = "packed, zero points" if "weight_zero_point" in infos else "packed, symmetric"
    else:
        first = infos.get("weight", next(iter(infos.values())))
        shape, nbytes, kind = list(first.shape), first.nbytes, first.dtype_name
    count = 1
    for size in shape:
        count *= size
    bits = round(8 * nbytes / count, 3) if count else None
    total = sum(info.nbytes for info in infos.values())
    row = {"layer": module, "format": kind, "shape": "x".join(map(str, shape))}
    return row | {"bytes": total, "bits a weight": bits}
