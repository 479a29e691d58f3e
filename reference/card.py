"""Write the model cards: `python -m reference.card --out compressor/reference_model`.

Measures both models on the held-out text and fills in README.md of base/ and draft/.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reference.measure import held_out, next_line_accuracy

_ROWS = 12  # of the loss table

_HEAD = """\
---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
language: [en, code]
library_name: transformers
tags: [llama, reference, from-scratch]
---
"""

_INTRO = {
    "base": """\
# Reference model, base

A small Llama trained from scratch on the Python standard library. It ships with the package so
that every example, test and benchmark runs offline on real weights, real text and a real
tokenizer. It has learnt the style of the library's code and little of its meaning: it answers
chat questions in the right form with wrong content, and greedy decoding soon repeats itself.
""",
    "draft": """\
# Reference model, draft

A small Llama that imitates the base model beside it, with the same tokenizer. It exists for
speculative decoding: cheap guesses that the base model checks. It was distilled with the forward
divergence KL(base || draft), with the finished, shipped base model as the teacher.
""",
}

_LOSS_NAME = {
    "base": "cross-entropy, nats per token, on the training batch",
    "draft": "divergence from the base, nats per token, on the training batch",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a card reports about one model."""

    name: str
    config: dict[str, Any]
    curve: dict[str, Any]
    corpus: dict[str, Any]
    measured: dict[str, str]


def gather(root: Path, name: str) -> Facts:
    """Measure the model `root/name` and read what its training left behind."""
    folder = root / name
    report = held_out(folder)
    accuracy = next_line_accuracy(folder)
    return Facts(
        name=name,
        config=_read(folder / "config.json"),
        curve=_read(folder / "loss_curve.json"),
        corpus=_read(root / "base" / "training_files.json"),
        measured={
            "bits per byte": f"{report.bits_per_byte:.3f}",
            "loss, nats per token": f"{report.loss:.3f}",
            "tokens per byte": f"{report.tokens / report.bytes:.3f}",
            "which of 4 lines comes next (200 items, chance 25 %)": f"{accuracy:.1%}",
            "file": f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f} MB",
        },
    )


def render(facts: Facts) -> str:
    """The card as Markdown."""
    parts = [_HEAD, _INTRO[facts.name], _architecture(facts), _data(facts), _quality(facts)]
    return "\n".join([*parts, _training(facts), _LICENCE])


def _architecture(facts: Facts) -> str:
    c = facts.config
    return f"""\
## Architecture

`LlamaForCausalLM`: hidden {c["hidden_size"]}, intermediate {c["intermediate_size"]},
{c["num_hidden_layers"]} layers, {c["num_attention_heads"]} query and {c["num_key_value_heads"]}
key-value heads of {c["head_dim"]}, context {c["max_position_embeddings"]}, tied embeddings,
byte-level BPE of {c["vocab_size"]} entries, weights in {c["dtype"]}. Texts start with `<|bos|>`
(the tokenizer adds it) and end with `<|eos|>`. A chat is
`<|user|>question<|assistant|>answer<|eos|>`; `chat_template.jinja` writes it.
"""


def _data(facts: Facts) -> str:
    held = ", ".join(f"`{path}`" for path in facts.corpus["held_out"])
    return f"""\
## Data

Source files of the standard library of CPython {facts.corpus["python"]} that were on the machine
(no tests, no site-packages): {len(facts.corpus["training_files"])} files,
{facts.corpus["bytes"]:,} bytes; the topics of `help()` as prose; short chats made from signatures
and docstrings. Nothing was downloaded. Names and sha256 digests of all files are in
`base/training_files.json`. Held out, in every form: {held}.
"""


def _quality(facts: Facts) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.measured.items())
    return f"""\
## Quality on held-out modules

| measure | value |
|---|---|
{rows}

Text: `data/evaluation.jsonl`, weights as shipped, computed in float32. Repeat with
`python -m reference.measure compressor/reference_model/{facts.name}`.
"""


def _training(facts: Facts) -> str:
    rows = facts.curve["rows"]
    last = len(rows) - 1
    count = min(_ROWS, len(rows))
    chosen = [rows[round(i * last / max(count - 1, 1))] for i in range(count)]
    table = "\n".join(f"| {step} | {seconds:.0f} | {loss:.3f} |" for step, seconds, loss in chosen)
    note = f"\n{facts.curve['note']}\n" if "note" in facts.curve else ""
    script = "train" if facts.name == "base" else "distill_draft"
    return f"""\
## Training

`python -m reference.{script}`: {facts.curve["steps"]:,} steps, {facts.curve["tokens"]:,} tokens, in
{facts.curve["seconds"] / 60:.0f} minutes on two shared CPU cores in float32. Muon for the hidden
matrices, AdamW for embedding and norms; the learning rate follows the clock (warmup, then straight
to zero). `loss_curve.json` holds the mean of every ten steps; here are a few:

| step | seconds | {_LOSS_NAME[facts.name]} |
|---|---|---|
{table}
{note}"""


_LICENCE = """\
## Licence and limits

The training text, and the texts in `data/`, are Python's own, under the PSF Licence Agreement
(https://docs.python.org/3/license.html), copyright Python Software Foundation. The model can
repeat passages of it. Do not use it for anything but tests, examples and measurements.
"""


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of base/ and draft/")
    parser.add_argument("--only", choices=["base", "draft"], action="append", help="one card")
    options = parser.parse_args(arguments)
    root = options.out
    for name in options.only or ("base", "draft"):
        text = render(gather(root, name))
        (root / name / "README.md").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
