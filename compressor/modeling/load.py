"""Load a whole model of transformers' own class, from a dense or a packed checkpoint.

Every tensor is read by our strict reader, so a missing or misshapen one is an error and never a
random value. `packed=True` leaves quantized linears packed in memory; `packed=False` expands them
to dense weights (the slow, plain way that verification compares with).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compressor.algorithms.input_rounding import round_inputs
from compressor.artifact.formats import LayerFormat
from compressor.artifact.packing import PackedWeight, dense_weight
from compressor.artifact.schema import read_formats
from compressor.errors import CheckpointError, Where
from compressor.modeling.checkpoint import Checkpoint, open_checkpoint
from compressor.modeling.experts import split_experts
from compressor.modeling.families import disk_name
from compressor.modeling.linears import is_linear
from compressor.modeling.packed_linear import PackedEmbedding, PackedLinear
from compressor.modeling.skeleton import empty_model, tied_names
from compressor.modeling.state import read_parts, spellings, stored_scale
from compressor_kernels.cpu import has_fast_bf16

# Rounding inputs adds 1-2 % to the divergence of 4-bit weights, but more than 8-bit weights have.
ROUNDED_BITS = 4


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Where and how to hold the model.

    Args:
        packed: keep quantized linears packed.
        device: torch device.
        dtype: of activations and dense weights; None = the checkpoint's on a GPU or a CPU with
            fast bf16, else float32.
        trust_remote_code: never True unless the user said so.
        cpu_activations: "int8" lets the C kernels of a CPU round the inputs of packed linears to
            eight bits, "auto" those with weights of at most `ROUNDED_BITS`, "float" none.
    """

    packed: bool = True
    device: str = "cpu"
    dtype: torch.dtype | None = None
    trust_remote_code: bool = False
    cpu_activations: str = "float"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        model: transformers' own class.
        tokenizer: as saved with the checkpoint; None if the folder has none.
        resident_bytes: bytes of the quantized weights in memory that kernels read packed.
        packed_bytes: bytes of the same weights on disk (codes, scales, zero points).
        weight_bytes: all weight bytes in memory, dense ones included.
        kernels: how many linears each kernel computes, by its name.
        notes: what a person should know.
        checkpoint: the strict reader's view of the folder.
    """

    model: PreTrainedModel
    tokenizer: Any
    resident_bytes: int
    packed_bytes: int
    weight_bytes: int
    kernels: dict[str, int]
    notes: tuple[str, ...]
    checkpoint: Checkpoint


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def load_model(
    path: Path,
    *,
    packed: bool = True,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    cpu_activations: str = "float",
) -> LoadedModel:
    """Load a checkpoint folder (arguments: see `LoadOptions`).

    Raises:
        CheckpointError: anything wrong with the folder (CK rows).
        UnsupportedError: unknown architecture or quantization method.
    """
    checkpoint = open_checkpoint(Path(path))
    options = LoadOptions(packed, device, dtype, cpu_activations=cpu_activations)
    model = empty_model(checkpoint.config)
    split_experts(model)
    chosen = options.dtype or _auto_dtype(checkpoint, device)
    reader = _Reader(checkpoint, model, chosen, options)
    reader.fill()
    model.to(device)
    model.config.dtype = chosen
    _generation_config(model, checkpoint.path)
    return LoadedModel(
        model=model,
        tokenizer=load_tokenizer(checkpoint.path),
        resident_bytes=reader.resident_bytes,
        packed_bytes=reader.packed_bytes,
        weight_bytes=sum(t.nbytes for t in _all_weights(model)),
        kernels=reader.kernels,
        notes=(*checkpoint.notes, *reader.notes),
        checkpoint=checkpoint,
    )


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a folder, or None if it has none.

    Raises:
        CheckpointError: there are tokenizer files, and transformers cannot read them.
    """
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((path / n).is_file() for n in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise CheckpointError(
            f"the tokenizer cannot be loaded: {error}",
            code="CK37",
            where=Where(str(path)),
            fix="copy the tokenizer files of the original model again",
        ) from error


def _auto_dtype(checkpoint: Checkpoint, device: str) -> torch.dtype:
    stored = {i.dtype for i in checkpoint.tensors.values() if i.dtype in _FLOATS}
    lowest = min(stored, key=lambda d: d.itemsize, default=torch.float32)
    if lowest == torch.float32 or (torch.device(device).type == "cpu" and not has_fast_bf16()):
        return torch.float32
    return lowest


def _generation_config(model: PreTrainedModel, path: Path) -> None:
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)


def _all_weights(model: nn.Module) -> Iterator[Tensor]:
    seen: set[int] = set()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            yield tensor


class _Reader:
    """Fills one empty model from one checkpoint, tensor by tensor."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: PreTrainedModel,
        dtype: torch.dtype,
        options: LoadOptions,
    ) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self.dtype = dtype
        self.options = options
        self.model_type = str(model.config.model_type)
        self.resident_bytes = 0
        self.packed_bytes = 0
        self.kernels: dict[str, int] = {}
        self.dequantized: dict[str, int] = {}  # linears without a kernel, by format

    @property
    def notes(self) -> list[str]:
        """What a person should know about how the weights are held."""
        notes = [
            f"{count} {label} layers have no kernel here: dequantized once, held as {self.dtype}"
            for label, count in self.dequantized.items()
        ]
        if any(name.endswith(".k_scale") for name in self.checkpoint.tensors):
            notes.append("scales of an fp8 cache are stored; only serving rounds keys and values")
        return notes

    def fill(self) -> None:
        """Replace every meta parameter by the checkpoint's tensor; quantized linears first."""
        formats = self._formats()
        for name, fmt in formats.items():
            self._fill_quantized(name, fmt)
        tied = tied_names(self.model)
        state = self.model.state_dict()
        names = [n for n in state if n not in tied and state[n].device.type == "meta"]
        dense = {n: self._read(n).to(self.dtype) for n in names}
        self.model.load_state_dict(dense, strict=False, assign=True)
        if not tied & {f"{name}.weight" for name in formats}:
            self.model.tie_weights()
        self.model.requires_grad_(False)
        self.model.eval()

    def disk_name(self, name: str) -> str:
        """The name of a model tensor in the files."""
        for spelling in spellings(name):
            for candidate in (spelling, _block_rename(self.model_type, spelling)):
                if candidate in self.checkpoint.tensors:
                    return candidate
        where = Where(str(self.checkpoint.path), tensor=name)
        raise CheckpointError("tensor is in no file of the checkpoint", code="CK21", where=where)

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.read(self.disk_name(name), check_finite=True)

    def _formats(self) -> dict[str, LayerFormat]:
        config = self.checkpoint.config.get("quantization_config")
        if config is None:
            return {}
        names = [n for n, m in self.model.named_modules() if is_linear(m) or _is_table(m)]
        stored = self.checkpoint.tensors
        disk = {n: self._linear_on_disk(n) for n in names}
        packed = {n: d for n, d in disk.items() if f"{d}.weight_scale" in stored}
        scales = {d: stored_scale(stored[f"{d}.weight_scale"].dtype) for d in packed.values()}
        formats = read_formats(config, scales, file=str(self.checkpoint.path / "config.json"))
        return {n: formats[d] for n, d in packed.items()}

    def _linear_on_disk(self, name: str) -> str:
        for spelling in spellings(f"{name}.weight"):
            for candidate in (spelling, _block_rename(self.model_type, spelling)):
                stem = candidate.removesuffix(".weight")
                if f"{stem}.weight_scale" in self.checkpoint.tensors:
                    return stem
        return name

    def _fill_quantized(self, name: str, fmt: LayerFormat) -> None:
        packed = PackedWeight(self._parts(name), fmt)
        module = self.model.get_submodule(name)
        bias = None if getattr(module, "bias", None) is None else self._read(f"{name}.bias")
        on_disk = packed.nbytes - 16 * ("weight_shape" in packed.tensors)
        if not self.options.packed:
            self.packed_bytes += on_disk
            dense = dense_weight(packed).to(self.dtype)
            weight = dense.t().contiguous() if isinstance(module, Conv1D) else dense
            module.load_state_dict({"weight": weight}, strict=False, assign=True)
            _round_inputs_of(module, packed)
            return
        made = self._packed_module(module, packed, bias)
        if made.plan.name == "dense":
            self.dequantized[fmt.label] = self.dequantized.get(fmt.label, 0) + 1
        else:
            self.packed_bytes += on_disk
            self.resident_bytes += made.resident_bytes
        self.kernels[made.plan.name] = self.kernels.get(made.plan.name, 0) + 1
        self.model.set_submodule(name, made)

    def _packed_module(
        self, module: nn.Module, packed: PackedWeight, bias: Tensor | None
    ) -> PackedLinear | PackedEmbedding:
        device = torch.device(self.options.device)
        if isinstance(module, nn.Embedding):
            return PackedEmbedding(module, packed, device=device, dtype=self.dtype)
        kind = self.options.cpu_activations
        rounds = kind == "int8" or (kind == "auto" and packed.format.bits <= ROUNDED_BITS)
        return PackedLinear(packed, bias, device=device, dtype=self.dtype, rounds=rounds)

    def _parts(self, name: str) -> dict[str, Tensor]:
        """The stored tensors of a layer; the head of a tied matrix takes the embedding's codes."""
        parts = read_parts(self.checkpoint, self._linear_on_disk(name))
        ties = getattr(self.model, "_tied_weights_keys", None) or {}
        if len(parts) == 1 and isinstance(ties, dict) and f"{name}.weight" in ties:
            partner = ties[f"{name}.weight"].removesuffix(".weight")
            parts = read_parts(self.checkpoint, self._linear_on_disk(partner))
        return parts


def _is_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def _round_inputs_of(linear: nn.Module, packed: PackedWeight) -> None:
    """Let a dense linear see what the format lets it see."""
    kind, known = packed.format.activations, packed.tensors.get("input_global_scale")

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (round_inputs(args[0], kind, known), *args[1:])

    if kind != "none":
        linear.register_forward_pre_hook(hook)


def _block_rename(model_type: str, name: str) -> str:
    """Apply the family's old names to the part of a name after the block's number."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part.isdigit():
            prefix, rest = ".".join(parts[: at + 1]), ".".join(parts[at + 1 :])
            return f"{prefix}.{disk_name(model_type, rest)}"
    return name
