"""Do scales and rotations repair what outlier channels break, and what do they cost elsewhere?

    python -m benchmarks transforms --model DIR --calibration TEXT --evaluation TEXT [--outliers 50]

Tiny language models have no outlier channels, so `--outliers F` gives them some without changing
what they compute: two channels in a hundred behind every norm are multiplied by F and the columns
that read them divided by it. Each variant is quantized (symmetric, group 32), packed, loaded again
and compared with the original on the same rows: KL in nats a token, once with the weights alone and
once with the inputs of every linear rounded to 4 bits, one scale for each token.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from compressor.algorithms.divergence import kl_tokens
from compressor.data import token_rows
from compressor.modeling.load import load_model
from compressor.pipeline import RunOptions, run
from compressor.recipe import DataConfig, parse_recipe

GROUP = 32
AWQ: dict[str, Any] = {"kind": "transform", "method": "awq", "group_size": GROUP}
ROTATE: dict[str, Any] = {"kind": "transform", "method": "rotate"}
SMOOTH: dict[str, Any] = {"kind": "transform", "method": "smoothquant"}
TRANSFORMS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "awq": [AWQ],
    "awq, norms only": [{**AWQ, "pairs": ["norm"]}],
    "smoothquant": [SMOOTH],
    "rotate": [ROTATE],
    "rotate, awq": [ROTATE, AWQ],
}
SOLVERS: dict[str, dict[str, Any]] = {"rtn": {"method": "rtn"}, "ours": {}}
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


def main(arguments: list[str]) -> None:
    """Run all variants and write one JSON object with a row for each."""
    options = _parse(arguments)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / Path(options.model).name
        shutil.copytree(options.model, model)
        if options.outliers != 1.0:
            add_outliers(model, options.outliers)
        judge = _Judge(Path(options.model), options)
        for bits in options.bits:
            for solver, keys in SOLVERS.items():
                for name in options.transforms or TRANSFORMS:
                    stages = [{**s, **_bits(s, bits)} for s in TRANSFORMS[name]]
                    row = {"bits": bits, "solver": solver, "transform": name}
                    row |= _measure(model, [*stages, _quantize(bits, keys)], judge, options)
                    rows.append(row)
                    _write(rows, options)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks transforms")
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=192)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--transforms", nargs="*", choices=[*TRANSFORMS])
    parser.add_argument("--outliers", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/transforms.json"))
    return parser.parse_args(arguments)


def _bits(stage: dict[str, Any], bits: int) -> dict[str, Any]:
    return {"bits": bits} if stage["method"] == "awq" else {}


def _quantize(bits: int, keys: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "quantize", "scheme": "W4A16", "bits": bits, "group_size": GROUP, **keys}


def add_outliers(model: Path, factor: float) -> None:
    """Multiply every fiftieth channel behind the norms of a llama; the function stays."""
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if stem.endswith(NORMS):
            tensor[7::50] *= factor
        elif stem.endswith(READERS):
            tensor[:, 7::50] /= factor
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def _measure(
    model: Path, stages: list[dict[str, Any]], judge: _Judge, options: argparse.Namespace
) -> dict[str, Any]:
    data = {"source": options.calibration, "num_samples": options.rows}
    data["seq_len"] = options.seq_len
    with tempfile.TemporaryDirectory() as folder:
        recipe = {
            "name": "transforms",
            "model": {"path": str(model)},
            "output": f"{folder}/out",
            "samples": 0,
            "stages": [
                {"kind": "calibrate", "data": data},
                *stages,
                {"kind": "pack", "kernels_archs": []},
            ],
        }
        start = time.monotonic()
        result = run(parse_recipe(json.dumps(recipe), file="transforms"), RunOptions())
        found = judge.divergences(result.output)
        size = sum(f.stat().st_size for f in result.output.glob("*.safetensors"))
    return {**found, "weight_bytes": size, "seconds": round(time.monotonic() - start, 1)}


class _Judge:
    """The original's logits on the evaluation rows."""

    def __init__(self, model: Path, options: argparse.Namespace) -> None:
        data = DataConfig(
            source=options.evaluation, num_samples=options.rows, seq_len=options.seq_len, seed=0
        )
        original = load_model(model, packed=False, dtype=torch.float32).model
        tokenizer = AutoTokenizer.from_pretrained(model)
        vocabulary = int(original.config.vocab_size)
        self.tokens = token_rows(data, tokenizer, vocab_size=vocabulary).tokens
        self.wanted = self._logits(original)

    def divergences(self, artifact: Path) -> dict[str, float]:
        """Mean KL of an artifact, and of the artifact with 4-bit inputs."""
        model = load_model(artifact, packed=False, dtype=torch.float32).model
        plain = float(kl_tokens(self.wanted, self._logits(model)).mean())
        layers = model.get_submodule("model.layers")
        for module in layers.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(_four_bits)
        return {"kl": plain, "kl_a4": float(kl_tokens(self.wanted, self._logits(model)).mean())}

    @torch.no_grad()
    def _logits(self, model: Callable[..., Any]) -> Tensor:
        parts = [model(input_ids=t, use_cache=False).logits for t in torch.split(self.tokens, 16)]
        return torch.cat(parts)


def _four_bits(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Symmetric 4-bit rounding of inputs [..., I], a scale for each token."""
    x = args[0]
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 7
    return ((x / scale).round().clamp(-8, 7) * scale, *args[1:])


def _write(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    protocol = {
        "model": Path(options.model).name,
        "calibration": Path(options.calibration).name,
        "evaluation": Path(options.evaluation).name,
        "rows": options.rows,
        "seq_len": options.seq_len,
        "group_size": GROUP,
        "symmetric": True,
        "outliers": options.outliers,
    }
    body = {"protocol": protocol, "rows": rows}
    options.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
