"""A 4-bit Llama of any shape with random weights: for speed, which does not depend on them.

Every linear, the head included, is W4A16 with float16 scales of groups of 32 (llama.cpp's Q4_0 has
the same bits); embeddings and norms are float16. `write_gguf` gives llama.cpp the same shapes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from compressor.artifact.formats import LayerFormat
from compressor.artifact.schema import quantization_config

FORMAT = LayerFormat(4, 32, True, "float16")
SCALE = 0.003


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama; the default is that of TinyLlama 1.1 B."""

    hidden: int = 2048
    inner: int = 5632
    layers: int = 22
    heads: int = 32
    kv_heads: int = 4
    vocab: int = 32000
    context: int = 4096

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the linears of a block, by name."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }

    @property
    def read_bytes(self) -> float:
        """Bytes of weights that one decoded token reads: 4.5 bits each, head included."""
        block = sum(rows * columns for rows, columns in self.linears.values())
        return (block * self.layers + self.vocab * self.hidden) * 4.5 / 8


def write_artifact(shape: Shape, folder: Path) -> Path:
    """Write config, tokenizer and weights (0.7 GB for the default shape); returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {
        "model.embed_tokens.weight": torch.randn(
            shape.vocab, shape.hidden, generator=generator, dtype=torch.float32
        ).half(),
        "model.norm.weight": torch.ones(shape.hidden, dtype=torch.float16),
    }
    names = {}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        names |= {prefix + name: size for name, size in shape.linears.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(shape.hidden, dtype=torch.float16)
    for name, size in {**names, "lm_head": (shape.vocab, shape.hidden)}.items():
        tensors |= {f"{name}.{part}": t for part, t in _random_linear(size, generator).items()}
    save_file(tensors, str(folder / "model.safetensors"), {"format": "pt"})
    _save_config(shape, dict.fromkeys(names, FORMAT), folder)
    return folder


def _random_linear(size: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    rows, columns = size
    words = torch.randint(-(2**31), 2**31, (rows, columns // 8), generator=generator)
    return {
        "weight_packed": words.to(torch.int32),
        "weight_scale": torch.full((rows, columns // 32), SCALE, dtype=torch.float16),
        "weight_shape": torch.tensor([rows, columns]),
    }


def _save_config(shape: Shape, formats: dict[str, LayerFormat], folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, max_position_embeddings=shape.context,
        tie_word_embeddings=False, dtype="float16", architectures=["LlamaForCausalLM"],
    ).to_dict()  # fmt: skip
    config["quantization_config"] = quantization_config(formats, [], outer={"lm_head": FORMAT})
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    words = {f"w{i}": i for i in range(shape.vocab)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2").save_pretrained(folder)


def write_gguf(shape: Shape, file: Path, gguf: Any) -> Path:
    """The same shapes as a Q4_0 file; `gguf` is llama.cpp's Python package."""
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    for name, size in _gguf_names(shape).items():
        if isinstance(size, int):
            writer.add_tensor(name, torch.ones(size).numpy())
        else:
            kind = gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor(name, _random_q4_0(*size).numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _gguf_names(shape: Shape) -> dict[str, tuple[int, int] | int]:
    sizes: dict[str, tuple[int, int] | int] = {
        "token_embd.weight": (shape.vocab, shape.hidden),
        "output.weight": (shape.vocab, shape.hidden),
        "output_norm.weight": shape.hidden,
    }
    order = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    for layer in range(shape.layers):
        for name, size in zip(order, shape.linears.values(), strict=True):
            sizes[f"blk.{layer}.{name}.weight"] = size
        sizes[f"blk.{layer}.attn_norm.weight"] = shape.hidden
        sizes[f"blk.{layer}.ffn_norm.weight"] = shape.hidden
    return sizes


def _random_q4_0(rows: int, columns: int) -> Tensor:
    """Blocks of 32 weights: a float16 scale, then 16 bytes of two codes each."""
    blocks = torch.randint(0, 256, (rows, columns // 32, 18), dtype=torch.uint8)
    blocks[:, :, :2] = torch.tensor([SCALE], dtype=torch.float16).view(torch.uint8)
    return blocks.view(rows, -1)
