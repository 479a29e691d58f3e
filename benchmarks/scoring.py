"""What a compressed checkpoint loses against its original, and how many bytes it takes.

Every checkpoint, ours or another tool's, is opened by the same strict reader, expanded to float32
and compared on the same rows; figures of one model are paired, token by token.

bytes = untouched tensors as the original stores them
      + for each quantized linear: codes + scales (16 bit) + zero points, as compressed-tensors
        packs them (`LayerFormat.packed_bytes`), whoever made it
HQQ's real-valued zero points take 16 bits each. Average bits are those of the quantized linears.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from compressor.artifact.formats import LayerFormat
from compressor.artifact.schema import read_formats
from compressor.modeling.checkpoint import Checkpoint, open_checkpoint
from compressor.modeling.load import load_model
from compressor_eval.divergence import TokenScores, score_tokens, summarize

SCORES = ("perplexity_ratio", "perplexity_ratio_ci", "kl_mean", "kl_mean_ci", "kl_p99",
          "top1_agreement")  # fmt: skip
REAL_ZERO_POINTS = ("hqq",)


class Remembered(nn.Module):
    """A model that computes the logits of each batch once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: dict[bytes, Any] = {}

    def forward(self, input_ids: Tensor) -> Any:
        """Logits as the model itself gives them."""
        key = input_ids.numpy().tobytes()
        if key not in self.seen:
            self.seen[key] = self.model(input_ids=input_ids)
        return self.seen[key]


@dataclass(frozen=True, slots=True)
class Judge:
    """One original, its logits remembered, and the rows that judge."""

    original: Checkpoint
    base: nn.Module
    tokens: Tensor

    @staticmethod
    def of(model: Path, tokens: Path) -> Judge:
        """Open the original in float32."""
        base = load_model(model, packed=False, dtype=torch.float32).model
        base.config.use_cache = False
        return Judge(open_checkpoint(model), Remembered(base), torch.load(tokens))

    def score(self, folder: Path, case: Case) -> dict[str, Any]:
        """Bytes and damage of one compressed checkpoint; `kl_documents`: mean KL of each row."""
        model = load_model(folder, packed=False, dtype=torch.float32).model
        model.config.use_cache = False
        if case.bits is not None:
            check_levels(model, case)
        scores = score_tokens(self.base, model, self.tokens)
        result = summarize(scores, self.tokens).as_json()
        sizes = stored_size(self.original, formats_of(self.original, folder, case), case.tool)
        damage = {key: result[key] for key in SCORES}
        return {**sizes, **damage, "kl_documents": by_document(scores)}


def by_document(scores: TokenScores) -> list[float]:
    """Mean KL of each row of tokens, to five digits."""
    sums = np.bincount(scores.row, weights=scores.kl)
    return [float(f"{value:.5g}") for value in sums / np.bincount(scores.row)]


def quantized_linears(original: Checkpoint) -> dict[str, tuple[int, int]]:
    """Shapes [out, in] of the linears of the decoder blocks."""
    stored = original.tensors.items()
    matrices = {n: i.shape for n, i in stored if ".layers." in n and len(i.shape) == 2}
    return {n.removesuffix(".weight"): (shape[0], shape[1]) for n, shape in matrices.items()}


def formats_of(original: Checkpoint, folder: Path, case: Case) -> dict[str, LayerFormat | None]:
    """The format of every linear; None = left as it was."""
    names = quantized_linears(original)
    config = open_checkpoint(folder).config.get("quantization_config")
    if config is None:
        if case.bits is None:  # a budget large enough to leave all as it was
            return dict.fromkeys(names)
        return dict.fromkeys(names, LayerFormat(case.bits, case.group, case.symmetric, "float16"))
    stored = open_checkpoint(folder).tensors
    packed = [n for n in names if f"{n}.weight" not in stored]
    found = read_formats(config, dict.fromkeys(packed, "float16"), file="config.json")
    return {n: found.get(n) for n in names}


def stored_size(
    original: Checkpoint, formats: dict[str, LayerFormat | None], tool: str
) -> dict[str, float]:
    """Bytes of all weights, and bits for each weight of the linears."""
    shapes = quantized_linears(original)
    dense = {n: i.nbytes for n, i in original.tensors.items()}
    linears = 0
    for name, fmt in formats.items():
        size = dense.pop(f"{name}.weight")
        linears += size if fmt is None else _packed(fmt, shapes[name], tool)
    weights = sum(rows * columns for rows, columns in shapes.values())
    return {
        "bytes": linears + sum(dense.values()),
        "average_bits": round(8 * linears / weights, 4),
    }


def _packed(fmt: LayerFormat, shape: tuple[int, int], tool: str) -> int:
    if tool not in REAL_ZERO_POINTS:
        return fmt.packed_bytes(shape)
    symmetric = LayerFormat(fmt.bits, fmt.group_size, True, fmt.scale_dtype)
    return symmetric.packed_bytes(shape) + 2 * shape[0] * fmt.num_groups(shape[1])


def check_levels(model: nn.Module, case: Case) -> None:
    """No group may hold more different values than its codes can name.

    Raises:
        ValueError: a tool saved weights that are not on the grid it is credited with.
    """
    assert case.bits is not None, "only uniform cases have one width"
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or ".layers." not in name:
            continue
        weight = module.weight
        groups = weight.reshape(-1, weight.shape[1] if case.group == -1 else case.group)
        levels = 1 + int((groups.sort(1).values.diff(dim=1) != 0).sum(1).max())
        if levels > 2**case.bits:
            raise ValueError(f"{name}: {levels} different values in a group of {case.bits} bits")
