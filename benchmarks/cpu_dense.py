"""transformers' own Llama of the benchmark's shape, dense: prefill and decode of one sequence.

    python -m benchmarks.cpu_dense DTYPE THREADS       # bfloat16, float32

bfloat16 without instructions for it computes long prompts at 1 GFLOP/s: its prefill is left out.
The last line on stdout is JSON: tokens a second.
"""

from __future__ import annotations

import json
import sys
import time
from statistics import median

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.cpu_model import Shape

PROMPT, NEW = 128, 16


def main() -> None:
    """Measure the dtype given as the first argument."""
    dtype = getattr(torch, sys.argv[1])
    torch.set_num_threads(int(sys.argv[2]))
    found = measure(_model(Shape(), dtype), long_prompt=dtype == torch.float32)
    sys.stdout.write(json.dumps(found) + "\n")


@torch.inference_mode()
def measure(model: LlamaForCausalLM, *, long_prompt: bool) -> dict[str, float]:
    """Tokens a second of the prompt, if it is to be read, and of each token behind it (median)."""
    cache, times = DynamicCache(config=model.config), []
    found = {}
    if long_prompt:
        start = time.perf_counter()
        model(torch.zeros(1, PROMPT, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
        found["prefill"] = PROMPT / (time.perf_counter() - start)
    for _ in range(NEW):
        start = time.perf_counter()
        model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
        times.append(time.perf_counter() - start)
    return found | {"decode": 1 / median(times)}


def _model(shape: Shape, dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(0.01)  # the numbers do not matter for the time
    return model.eval()


if __name__ == "__main__":
    main()
