"""Tiny random checkpoints of real architectures, on disk in the form their real models have.

Norms and biases are moved away from one and zero, so that code which drops or swaps them is found.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SPECIAL = ("<unk>", "<s>", "</s>")
VOCAB = 320
SENTENCES = (
    "def read(path): return open(path).read()",
    "The quick brown fox jumps over the lazy dog while the rain falls on the plain.",
    "for index, value in enumerate(values): total += index * value",
    "A model learns to guess the next word from the words before it.",
    "import numpy as np; x = np.zeros((4, 8)); print(x.sum())",
)
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.08,
}
_GROUPED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.08,
}

# name -> (model_type, config)
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_GROUPED, "tie_word_embeddings": False}),
    "llama_tied": ("llama", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 32, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 16}),
    "gemma2": ("gemma2", {**_GROUPED, "head_dim": 32, "query_pre_attn_scalar": 32,
                          "sliding_window": 16}),
    "gemma3": ("gemma3_text", {**_GROUPED, "head_dim": 32, "query_pre_attn_scalar": 32,
                               "sliding_window": 16, "num_hidden_layers": 3}),
    "gpt_neox": ("gpt_neox", {**_COMMON, "rotary_pct": 0.25}),
    "gpt2": ("gpt2", _GPT2),
    "qwen3_moe": ("qwen3_moe", {**_GROUPED, "head_dim": 32, "num_experts": 4,
                                "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2,
                            "sliding_window": None}),
}  # fmt: skip
ARCHITECTURES: tuple[str, ...] = tuple(_CONFIGS)


def build(name: str, path: Path, **config_overrides: Any) -> Path:
    """Write checkpoint `name` with its tokenizer into `path`; the same call gives the same bytes.

    `dtype` ("float32", "bfloat16", ...) and `max_shard_size` ("100KB") may be among the overrides.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, config_overrides.pop("dtype", "float32"))
    shard = config_overrides.pop("max_shard_size", "5GB")
    model_type, settings = _CONFIGS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**settings, **config_overrides})
        model = AutoModelForCausalLM.from_config(config)
        _unsettle(model)
    model.to(dtype).save_pretrained(path, max_shard_size=shard)
    save_tokenizer(path)
    return path


@torch.no_grad()
def _unsettle(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))


def save_tokenizer(path: Path) -> None:
    """Train a byte-level BPE of VOCAB entries on a few sentences and save it for transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="</s>", model_max_length=256,
    )  # fmt: skip
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
