"""Where the model of this moment lies: the checkpoint, or the units that stages have written.

A stage never holds a model. It reads one block, changes it and commits it as a unit; the state
after the stage says for each block whether it is still the checkpoint's or a unit file. Dropping a
layer removes an entry from `blocks`; nothing is copied.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from compressor.artifact.formats import LayerFormat
from compressor.errors import CheckpointError, Where
from compressor.modeling.checkpoint import Checkpoint
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

    @staticmethod
    def of_checkpoint(checkpoint: Checkpoint) -> ModelState:
        """The untouched model."""
        skeleton = build_skeleton(checkpoint.config)
        refs = tuple(BlockRef(i) for i in range(skeleton.num_blocks))
        return ModelState(checkpoint, dict(checkpoint.config), refs)

    def skeleton(self) -> Skeleton:
        """A fresh skeleton of the present configuration, outer part filled."""
        return build_skeleton(self.config)

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
        """Embedding, final norm, head: every tensor outside of the blocks."""
        if self.outer is not None:
            return {n: t.clone() for n, t in load_file(self.outer).items()}
        return {n: self._read(n) for n in skeleton.outer_names()}

    def disk_tensor_name(self, name: str) -> str:
        """The name in the checkpoint's files of a tensor of the model."""
        for candidate in spellings(name):
            if candidate in self.checkpoint.tensors:
                return candidate
        where = Where(str(self.checkpoint.path), tensor=name)
        raise CheckpointError("tensor is in no file of the checkpoint", code="CK21", where=where)

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.read(self.disk_tensor_name(name), check_finite=True)


def spellings(name: str) -> list[str]:
    """How files spell a tensor: as the model does, without its base prefix, or by old names."""
    out = [name, name.partition(".")[2]]
    if name == "lm_head.weight":
        out.append("embed_out.weight")
    return out
