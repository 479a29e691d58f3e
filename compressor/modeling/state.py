"""Where the model of this moment lies: the checkpoint, or the units that stages have written.

A stage never holds a model. It reads one block, changes it and commits it as a unit; the state
after the stage says for each block whether it is still the checkpoint's or a unit file. Dropping a
layer removes an entry from `blocks`; nothing is copied.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from compressor.artifact.formats import SCALE_DTYPES, LayerFormat, ScaleDtype
from compressor.artifact.packing import SUFFIXES, PackedWeight, dense_weight
from compressor.artifact.schema import read_formats
from compressor.errors import CheckpointError, UnsupportedError, Where
from compressor.modeling.checkpoint import Checkpoint
from compressor.modeling.device import CPU
from compressor.modeling.families import disk_name
from compressor.modeling.skeleton import Skeleton, build_skeleton


@dataclass(frozen=True, slots=True)
class BlockTensors:
    """One block's tensors by block-relative module name; quantized linears as stored tensors.

    `formats` has an entry for each quantized linear, `masked` names linears whose zeros must stay.
    """

    tensors: dict[str, Tensor]
    formats: dict[str, LayerFormat] = field(default_factory=dict)
    masked: frozenset[str] = frozenset()

    def meta(self) -> dict[str, Any]:
        """What a unit's journal line says about these tensors."""
        formats = {name: fmt.as_json() for name, fmt in self.formats.items()}
        return {"formats": formats, "masked": sorted(self.masked)}


@dataclass(frozen=True, slots=True)
class BlockRef:
    """A block is either number `index` of the checkpoint or a unit file with its journal meta."""

    index: int
    file: Path | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelState:
    """The model between two stages: configuration, blocks in order, and the outer tensors."""

    checkpoint: Checkpoint
    config: dict[str, Any]
    blocks: tuple[BlockRef, ...]
    outer: Path | None = None
    trail: tuple[str, ...] = ()
    outer_formats: dict[str, LayerFormat] = field(default_factory=dict)

    @staticmethod
    def of_checkpoint(checkpoint: Checkpoint) -> ModelState:
        """The untouched model."""
        skeleton = build_skeleton(checkpoint.config)
        refs = tuple(BlockRef(i) for i in range(skeleton.num_blocks))
        return ModelState(checkpoint, dict(checkpoint.config), refs)

    def skeleton(self, device: torch.device = CPU) -> Skeleton:
        """A fresh skeleton of the present configuration; what it is filled with is on `device`."""
        found = build_skeleton(self.config)
        found.device = device
        return found

    def with_block(self, position: int, file: Path, meta: dict[str, Any]) -> ModelState:
        """The state after block `position` was committed as a unit."""
        refs = list(self.blocks)
        refs[position] = BlockRef(refs[position].index, file, meta)
        return replace(self, blocks=tuple(refs))

    def read_block(self, position: int, skeleton: Skeleton) -> BlockTensors:
        """Read one block (nothing else is touched)."""
        ref = self.blocks[position]
        if ref.file is not None:
            formats = {n: LayerFormat.from_json(f) for n, f in ref.meta["formats"].items()}
            tensors = {n: t.clone() for n, t in load_file(ref.file).items()}
            return BlockTensors(tensors, formats, frozenset(ref.meta["masked"]))
        names = skeleton.blocks[position].state_dict()
        prefix = f"{skeleton.blocks_name}.{ref.index}."
        read = {n: self._read(prefix + disk_name(skeleton.model_type, n)) for n in names}
        return BlockTensors(read)

    def read_outer(self, skeleton: Skeleton) -> dict[str, Tensor]:
        """Embedding, final norm, head: every tensor outside of the blocks, quantized ones dense."""
        if self.outer is not None:
            stored = {n: t.clone() for n, t in load_file(self.outer).items()}
            formats = self.outer_formats
        else:
            stored, formats = {}, {}
            for name in skeleton.outer_names():
                stem = self._quantized_stem(name)
                if stem is None:
                    stored[name] = self._read(name)
                    continue
                layer = name.removesuffix(".weight")
                formats[layer] = self._format(stem)
                parts = read_parts(self.checkpoint, stem)
                stored |= {f"{layer}.{suffix}": t for suffix, t in parts.items()}
        return _dense_outer(stored, formats)

    def _quantized_stem(self, name: str) -> str | None:
        """The layer's name on disk if the weight `name` is quantized there."""
        found = (s for s in spellings(name) if f"{s}_scale" in self.checkpoint.tensors)
        return next((s.removesuffix(".weight") for s in found), None)

    def _format(self, stem: str) -> LayerFormat:
        config = self.checkpoint.config.get("quantization_config") or {}
        scale = stored_scale(self.checkpoint.tensors[f"{stem}.weight_scale"].dtype)
        return read_formats(config, {stem: scale}, file="config.json")[stem]

    def disk_tensor_name(self, name: str) -> str:
        """The name in the checkpoint's files of a tensor of the model."""
        for candidate in spellings(name):
            if candidate in self.checkpoint.tensors:
                return candidate
        where = Where(str(self.checkpoint.path), tensor=name)
        raise CheckpointError("tensor is in no file of the checkpoint", code="CK21", where=where)

    def _read(self, name: str) -> Tensor:
        if self._quantized_stem(name) is not None:
            raise UnsupportedError(
                "the checkpoint is quantized already",
                code="CK34",
                where=Where(str(self.checkpoint.path), tensor=name),
                why="Its codes are no weights.",
                fix="start from the original 16-bit checkpoint",
            )
        return self.checkpoint.read(self.disk_tensor_name(name), check_finite=True)


def read_parts(
    checkpoint: Checkpoint, name: str, *, check_finite: bool = True
) -> dict[str, Tensor]:
    """The stored tensors of one quantized layer by suffix, as they are on disk."""
    known = [s for s in SUFFIXES if f"{name}.{s}" in checkpoint.tensors]
    return {s: checkpoint.read(f"{name}.{s}", check_finite=check_finite) for s in known}


def stored_scale(dtype: torch.dtype) -> ScaleDtype:
    """The name of a scale's dtype; those of one byte follow from the format."""
    names = {dtype: name for name, dtype in SCALE_DTYPES.items()}
    return names.get(dtype, "float32")  # type: ignore[return-value]


def _dense_outer(tensors: dict[str, Tensor], formats: dict[str, LayerFormat]) -> dict[str, Tensor]:
    """Weights instead of codes; the head of a tied matrix has only scales and is left out."""
    out = dict(tensors)
    for name, fmt in formats.items():
        parts = {s: out.pop(f"{name}.{s}") for s in SUFFIXES if f"{name}.{s}" in out}
        if "weight_scale" not in parts:  # a later stage wrote it dense
            out |= {f"{name}.{s}": t for s, t in parts.items()}
        elif len(parts) > 1:
            out[f"{name}.weight"] = dense_weight(PackedWeight(parts, fmt))
    return out


def spellings(name: str) -> list[str]:
    """How files spell a tensor: as the model does, without its base prefix, or by old names."""
    out = [name, name.partition(".")[2]]
    if name.startswith("lm_head."):
        out.append(name.replace("lm_head", "embed_out", 1))
    return out
