"""Held-out quality of a model folder: `python -m reference.measure FOLDER...`.

bits per byte = (sum of -log2 p(token)) / (UTF-8 bytes of the text)

which does not depend on the tokenizer. Each text is cut into windows of 511 tokens after a start
token, so every token is predicted once; the first of a window has no context but that token.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from compressor import reference_model


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What was measured on text the model never saw."""

    loss: float  # nats per token
    bits_per_byte: float
    tokens: int
    bytes: int


def held_out(folder: Path, *, max_texts: int | None = None) -> HeldOut:
    """Loss of the model in `folder` on the shipped evaluation text, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lines = reference_model.text_path("evaluation").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines[:max_texts]]
    total, count = 0.0, 0
    for text in texts:
        nats, tokens = _nats(model, tokenizer(text, verbose=False)["input_ids"])
        total, count = total + nats, count + tokens
    size = sum(len(text.encode()) for text in texts)
    return HeldOut(total / count, total / math.log(2) / size, count, size)


def next_line_accuracy(folder: Path) -> float:
    """Share of the multiple-choice items whose true line has the highest log-probability."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    path = reference_model.text_path("evaluation").with_name("next_line_mc.jsonl")
    items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    correct = 0
    for item in items:
        context = len(tokenizer(item["context"])["input_ids"])
        scores = []
        for choice in item["choices"]:
            ids = torch.tensor([tokenizer(item["context"] + choice)["input_ids"]])
            scores.append(-float(_losses(model, ids)[context - 1 :].sum()))
        correct += scores.index(max(scores)) == item["answer"]
    return correct / len(items)


def _nats(model: LlamaForCausalLM, ids: list[int]) -> tuple[float, int]:
    bos, body = ids[0], ids[1:]
    width = model.config.max_position_embeddings - 1
    pieces = [[bos, *body[start : start + width]] for start in range(0, len(body), width)]
    total = sum(float(_losses(model, torch.tensor([piece])).sum()) for piece in pieces)
    return total, len(body)


@torch.no_grad()
def _losses(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")


def main() -> None:
    for name in sys.argv[1:]:
        report = asdict(held_out(Path(name)))
        report["next_line_accuracy"] = next_line_accuracy(Path(name))
        sys.stdout.write(json.dumps({"folder": name, **report}) + "\n")


if __name__ == "__main__":
    main()
