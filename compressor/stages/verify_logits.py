"""Tokens through the packed kernels and through the dense weights: are the logits the same?

A small model is loaded whole, exactly as it will be served. A large one (dense fp32 weights above
`WHOLE_MODEL_BYTES`) is walked with one block in memory, in both forms one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressor.artifact.formats import LayerFormat
from compressor.artifact.packing import SUFFIXES
from compressor.errors import VerificationError, Where
from compressor.modeling.block import Block, load_block
from compressor.modeling.checkpoint import Checkpoint
from compressor.modeling.families import disk_name
from compressor.modeling.linears import packed_from_tensors
from compressor.modeling.load import load_model
from compressor.modeling.packed_linear import PackedLinear
from compressor.modeling.skeleton import Skeleton
from compressor.modeling.state import BlockTensors, ModelState

TOLERANCE = 2e-5  # relative to the largest logit, fp32: sums in another order, nothing else
BF16_TOLERANCE = 2e-2  # also where inputs are rounded: a sum at the edge of two levels may fall off
WHOLE_MODEL_BYTES = 512 << 20
WALKED = "large model: packed and dense logits were compared with one block in memory"
Formats = dict[str, LayerFormat]


@dataclass(frozen=True, slots=True)
class LogitsCheck:
    """Largest difference relative to the largest logit, linears by kernel, and a note."""

    difference: float
    kernels: dict[str, int]
    notes: tuple[str, ...] = ()


def check_logits(checkpoint: Checkpoint, formats: Formats, num_tokens: int) -> LogitsCheck:
    """Compare packed and dense logits on random tokens.

    Args:
        checkpoint: the artifact.
        formats: of its quantized linears, by name on disk.
        num_tokens: tokens of the one row.

    Raises:
        VerificationError: they differ by more than rounding (NU07).
    """
    if not formats:
        return LogitsCheck(0.0, {})
    walked = dense_bytes(checkpoint, formats) > WHOLE_MODEL_BYTES
    with torch.no_grad():
        ours, dense, kernels = (
            _walked(checkpoint, formats, num_tokens)
            if walked
            else _whole(checkpoint.path, num_tokens)
        )
    difference = _distance(ours, dense)
    rounds = any(fmt.activations != "none" for fmt in formats.values())
    is_exact = ours.dtype == torch.float32 and not rounds
    limit = TOLERANCE if is_exact else BF16_TOLERANCE
    if rounds and difference > limit and dense.dtype != torch.float32:
        limit += _rounding(checkpoint.path, num_tokens, dense)
    if not difference <= limit:
        raise VerificationError(
            f"packed and dense logits differ by {difference:.2e} of the largest (limit {limit:g})",
            code="NU07",
            where=Where(str(checkpoint.path)),
            fix="run `compress doctor`; a kernel is wrong on this machine",
        )
    return LogitsCheck(difference, kernels, (WALKED,) if walked else ())


def _distance(logits: Tensor, from_: Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    largest = float(from_.float().abs().max())
    return float((logits.float() - from_.float()).abs().max()) / max(largest, 1e-12)


@torch.no_grad()
def _rounding(path: Path, num_tokens: int, dense: Tensor) -> float:
    """How far the dense model in its own dtype is from itself in float32.

    Where inputs are rounded to eight bits, the last bit of bf16 decides between two levels: on a
    processor with bf16 products of its own, no sum in another order comes closer than this.
    """
    return _distance(dense, _dense_logits(path, num_tokens, torch.float32))


def dense_bytes(checkpoint: Checkpoint, formats: Formats) -> int:
    """Bytes of all weights as fp32."""
    bits = {f"{name}.weight_packed": fmt.bits for name, fmt in formats.items()}
    total = 0
    for name, info in checkpoint.tensors.items():
        numel = int(torch.Size(info.shape).numel())
        per_item = 8 * info.dtype.itemsize
        total += 4 * (numel * per_item // bits[name] if name in bits else numel)
    return total


def _tokens(vocabulary: int, num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (1, num_tokens), generator=generator)


def _logits(model: PreTrainedModel, num_tokens: int) -> Tensor:
    tokens = _tokens(model.config.get_text_config().vocab_size, num_tokens)
    logits: Tensor = model(input_ids=tokens).logits
    return logits


def _dense_logits(path: Path, num_tokens: int, dtype: torch.dtype) -> Tensor:
    return _logits(load_model(path, packed=False, dtype=dtype).model, num_tokens)


def _whole(path: Path, num_tokens: int) -> tuple[Tensor, Tensor, dict[str, int]]:
    packed = load_model(path, packed=True)
    ours = _logits(packed.model, num_tokens)
    dtype, kernels = packed.model.dtype, packed.kernels
    del packed
    return ours, _dense_logits(path, num_tokens, dtype), kernels


def _walked(
    checkpoint: Checkpoint, formats: Formats, num_tokens: int
) -> tuple[Tensor, Tensor, dict[str, int]]:
    state = ModelState.of_checkpoint(checkpoint)
    skeleton = state.skeleton()
    skeleton.fill_outer(state.read_outer(skeleton), torch.float32)
    tokens = _tokens(skeleton.model.config.get_text_config().vocab_size, num_tokens)
    hidden, kwargs = skeleton.enter(tokens)
    ours = dense = hidden
    kernels: dict[str, int] = {}
    for position, known in enumerate(kwargs):
        source = _stored_block(state, skeleton, position, formats)
        block = load_block(skeleton, position, source)
        dense = block.run(dense, known)
        _use_kernels(block, source, kernels)
        ours = block.run(ours, known)
    return skeleton.leave(ours, tokens), skeleton.leave(dense, tokens), kernels


def _stored_block(
    state: ModelState, skeleton: Skeleton, position: int, formats: Formats
) -> BlockTensors:
    """One block of an artifact: packed parts of quantized linears, the rest as it lies."""
    tensors: dict[str, Tensor] = {}
    found: Formats = {}
    prefix = f"{skeleton.blocks_name}.{position}."
    for name in skeleton.blocks[position].state_dict():
        disk = prefix + disk_name(skeleton.model_type, name)
        stem = disk.removesuffix(".weight")
        if stem == disk or stem not in formats:
            tensors[name] = state.checkpoint.read(state.disk_tensor_name(disk))
            continue
        linear = name.removesuffix(".weight")
        found[linear] = formats[stem]
        for part in (f"{stem}.{suffix}" for suffix in SUFFIXES):
            if part in state.checkpoint.tensors:
                tensors[linear + part.removeprefix(stem)] = state.checkpoint.read(part)
    return BlockTensors(tensors, found)


def _use_kernels(block: Block, source: BlockTensors, kernels: dict[str, int]) -> None:
    """Replace the quantized linears of a block by the ones that will be served."""
    device: Any = torch.device("cpu")
    for name, fmt in source.formats.items():
        packed = packed_from_tensors(source.tensors, name, fmt)
        bias = source.tensors.get(f"{name}.bias")
        made = PackedLinear(packed, bias, device=device, dtype=torch.float32)
        kernels[made.plan.name] = kernels.get(made.plan.name, 0) + 1
        block.module.set_submodule(name, made)
    block.linears.clear()
