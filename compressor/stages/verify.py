"""Verify: what lies on disk is what quantization meant, and it computes what it should.

    1  every tensor's and file's SHA-256 is the manifest's
    2  the folder passes the strict reader, every expected tensor is there and finite
    3  packed words -> codes (independent reference reader) -> packed words gives the same bits
    4  inside a run: codes, scales and zero points equal those of the units, bit for bit
    5  tokens through the packed kernels and through the dense weights give the same logits

Steps 1-3 and 5 need only the folder, so `compress verify DIR` repeats them at any time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.artifact.formats import LayerFormat
from compressor.artifact.manifest import Manifest, read_manifest
from compressor.artifact.packing import (
    PackedWeight,
    dense_weight,
    pack_weight,
    unpack_weight,
)
from compressor.artifact.schema import read_formats
from compressor.errors import VerificationError, Where
from compressor.modeling.checkpoint import Checkpoint, open_checkpoint
from compressor.modeling.integrity import (
    check_files,
    check_tensors,
    check_weight_files,
    open_artifact,
    raw_bytes,
)
from compressor.modeling.state import read_parts, stored_scale
from compressor.recipe import VerifyConfig
from compressor.stages.context import StageContext, StageReport
from compressor.stages.kernels import kernels_match
from compressor.stages.pack import gather
from compressor.stages.verify_logits import check_logits

DEFAULT_TOKENS = 64
SCALE = ".weight_scale"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was checked; a report exists only if everything held."""

    num_tensors: int
    num_quantized: int
    num_files: int
    logits_difference: float
    kernels: dict[str, int]
    kernels_match: bool | None
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For reports and `--json`."""
        return {name: getattr(self, name) for name in VerifyReport.__slots__}


def apply(config: VerifyConfig, context: StageContext) -> StageReport:
    """Verify the artifact of this run, also against the units it was made of.

    Raises:
        VerificationError: any difference, naming file and tensor.
    """
    report = verify_artifact(context.artifact, tokens=config.tokens)
    compared = _compare_with_units(context)
    context.run.progress({"unit": "artifact", "index": 1, "total": 1})
    facts = report.as_json() | {"compared_with_units": compared}
    state = replace(context.state, trail=(*context.state.trail, "verify"))
    return StageReport(state, facts)


def verify_artifact(path: Path, *, tokens: int = DEFAULT_TOKENS) -> VerifyReport:
    """Check an artifact by its own manifest.

    Raises:
        VerificationError: CK40, NU06, NU07 or missing tensors (exit 11).
    """
    path = Path(path)
    manifest = read_manifest(path)
    checkpoint = open_artifact(path)
    check_files(path, manifest)
    check_weight_files(checkpoint)
    check_tensors(checkpoint, manifest)
    formats = _formats(checkpoint, manifest)
    for name in formats:
        _check_packing(checkpoint, name, formats)
    _check_masks(checkpoint, manifest, formats)
    logits = check_logits(checkpoint, formats, tokens)
    return VerifyReport(
        num_tensors=len(manifest.tensors),
        num_quantized=len(formats),
        num_files=len(manifest.files),
        logits_difference=logits.difference,
        kernels=logits.kernels,
        kernels_match=kernels_match(path),
        notes=(*checkpoint.notes, *logits.notes),
    )


def _formats(checkpoint: Checkpoint, manifest: Manifest) -> dict[str, LayerFormat]:
    """Formats by the manifest, which must be those that the configuration tells every loader."""
    scales = {
        name.removesuffix(SCALE): stored_scale(info.dtype)
        for name, info in checkpoint.tensors.items()
        if name.endswith(SCALE)
    }
    config = checkpoint.config.get("quantization_config")
    file = str(checkpoint.path / "config.json")
    told = {} if config is None else read_formats(config, scales, file=file)
    if manifest.formats != {name: fmt.as_json() for name, fmt in told.items()}:
        raise VerificationError(
            "config.json and the manifest tell different formats", code="CK40", where=Where(file)
        )
    return told


def read_packed(checkpoint: Checkpoint, name: str, fmt: LayerFormat) -> PackedWeight:
    """The stored tensors of one quantized linear."""
    return PackedWeight(read_parts(checkpoint, name, check_finite=False), fmt)


def _check_packing(checkpoint: Checkpoint, name: str, formats: dict[str, LayerFormat]) -> None:
    fmt = formats[name]
    packed = read_packed(checkpoint, name, fmt)
    if packed.tensors.keys() == {"weight_scale"}:  # of a tied head: the embedding has the codes
        return _check_tied(checkpoint, name, formats)
    scales = {"weight_scale": packed.tensors["weight_scale"]} | packed.global_scales
    if fmt.scale_dtype != "e8m0":
        _check_scales(checkpoint, name, scales)
    missing = [s for s in fmt.global_scales if s not in packed.tensors]
    if missing:
        where = Where(str(checkpoint.path), tensor=f"{name}.{missing[0]}")
        raise VerificationError("a global scale is missing", code="CK21", where=where)
    codes, scale, zero = unpack_weight(packed)
    again = pack_weight(codes, scale, zero, fmt, global_scales=packed.global_scales)
    for suffix, tensor in again.tensors.items():
        if not torch.equal(raw_bytes(tensor), raw_bytes(packed.tensors[suffix])):
            where = Where(str(checkpoint.path), tensor=f"{name}.{suffix}")
            raise VerificationError(
                "packing what was unpacked gives other bits", code="NU07", where=where
            )


def _check_tied(checkpoint: Checkpoint, name: str, formats: dict[str, LayerFormat]) -> None:
    scale = checkpoint.read(f"{name}.weight_scale")
    others = [n for n in formats if n != name and formats[n] == formats[name]]
    if not any(_same(scale, checkpoint.read(f"{n}.weight_scale")) for n in others):
        where = Where(str(checkpoint.path), tensor=f"{name}.weight_scale")
        raise VerificationError("a tied head has scales of its own", code="NU07", where=where)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(raw_bytes(one), raw_bytes(other))


def _check_scales(checkpoint: Checkpoint, name: str, scales: dict[str, Tensor]) -> None:
    for suffix, scale in scales.items():
        value = scale.float()  # a negative one turns a symmetric grid of integers over
        if not bool((torch.isfinite(value) & (value != 0)).all()):
            where = Where(str(checkpoint.path), tensor=f"{name}.{suffix}")
            raise VerificationError("a scale is zero or not finite", code="NU06", where=where)


def _check_masks(
    checkpoint: Checkpoint, manifest: Manifest, formats: dict[str, LayerFormat]
) -> None:
    """A linear that was pruned still has zeros (the prune stage's report says how many)."""
    for name in manifest.masked:
        if name in formats:
            packed = read_packed(checkpoint, name, formats[name])
            zeros = int((dense_weight(packed) == 0).sum())
        else:
            zeros = int((checkpoint.read(f"{name}.weight") == 0).sum())
        if not zeros:
            where = Where(str(checkpoint.path), tensor=name)
            raise VerificationError("a pruned weight has no zeros", code="NU07", where=where)


def _compare_with_units(context: StageContext) -> int:
    """Every tensor of the artifact against what the stages committed, bit for bit."""
    checkpoint = open_checkpoint(context.artifact)
    count = 0
    for name, tensor in _meant(context):
        stored = checkpoint.read(name)
        if stored.dtype != tensor.dtype or not torch.equal(raw_bytes(stored), raw_bytes(tensor)):
            where = Where(str(context.artifact), tensor=name)
            raise VerificationError(
                "what was written is not what the stages made", code="NU07", where=where
            )
        count += 1
    return count


def _meant(context: StageContext) -> Iterator[tuple[str, Tensor]]:
    for entry in gather(context.state, context.state.skeleton()).entries:
        yield entry.name, entry.load()
