"""The README.md of an artifact: what it is, how it was made, how good it is, how to load it.

Everything comes from the run; nothing is promised that was not measured. Paths are cut to their
last part and access tokens blacked out, because a card is made to be shared.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compressor.errors import printable
from compressor.run_dir.log import redact as redact_secrets

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{6,}")
_CREDENTIALS = re.compile(r"(?<=://)[^\s/@:]+(?::[^\s/@]*)?@")
_USER_HOME = re.compile(r"(?:[A-Za-z]:\\Users\\|/(?:home|Users)/)[^\s/\\\"':,;]+")
_PART = r"[^\s/\\\"'`<>|,;:()]"
_POSIX = re.compile(rf"(?<![\w/.<-])(?:file:/*)?~?/(?:{_PART}+/)+({_PART}*)")
_HOME_PATH = re.compile(rf"(?:file:/*)?~[\\/](?:{_PART}+[\\/])*({_PART}*)")
_WINDOWS = re.compile(rf"\b[A-Za-z]:\\(?:{_PART}+\\)*({_PART}*)")


def redact(text: str) -> str:
    """Black out access tokens; cut absolute paths to what lies below the working folder, or to
    their last part, so that no user or folder name of the machine is published."""
    text = _CREDENTIALS.sub("***@", _TOKEN.sub("***", redact_secrets(text)))
    for folder, short in ((Path.cwd(), ""), (Path.home(), "~/")):
        if folder != Path(folder.anchor):
            text = text.replace(f"{folder}/", short)
    text = _USER_HOME.sub("~", text)
    for pattern in (_HOME_PATH, _POSIX, _WINDOWS):
        text = pattern.sub(r"\1", text)
    return text


@dataclass(frozen=True, slots=True)
class CardData:
    """What the card tells; whatever is empty is left out."""

    name: str
    base_model: str  # hub id or folder name
    licence: str = ""  # of the base model, as its card or config states it
    command: str = ""  # the exact command line
    version: str = ""  # of compressor
    schemes: Sequence[Mapping[str, Any]] = ()  # {"layers": "28 x mlp.down_proj", "scheme": ...}
    original_bytes: int = 0
    artifact_bytes: int = 0
    average_bits: float = 0.0  # per weight of the compressed linears, with their scales
    calibration: str = ""  # source, rows, length, seed
    metrics: Mapping[str, Any] = field(default_factory=dict)  # Comparison.as_json()
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    verdict: str = ""
    limitations: Sequence[str] = ()
    has_kernels: bool = False


def render_card(data: CardData) -> str:
    """The card as Markdown with a front matter that the hub understands."""
    sections = [
        _front_matter(data),
        f"# {_inline(data.name)}\n\n{_summary(data)}",
        _section("How it was made", _code(redact(data.command), "bash") if data.command else ""),
        _section("What is stored how", _table(["layers", "scheme"], _scheme_rows(data))),
        _section("Size", _size(data)),
        _section("Quality against the original", _quality(data)),
        _section("Tasks", _tasks(data)),
        _section("How to load it", _loading(data)),
        _section("Limitations", _limitations(data)),
        _section("Licence", _licence(data)),
    ]
    return "\n\n".join(s for s in sections if s) + "\n"


def _front_matter(data: CardData) -> str:
    lines = ["---", "library_name: transformers", "tags: [compressed-tensors, compressor]"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", data.base_model):  # a hub id, not a folder
        lines += [f"base_model: {json.dumps(data.base_model)}", "base_model_relation: quantized"]
    if data.licence:
        lines.append(f"license: {json.dumps(printable(data.licence))}")
    return "\n".join([*lines, "---"])


def _summary(data: CardData) -> str:
    base = f"Compressed from **{_inline(data.base_model)}**"
    made = f" with compressor {_inline(data.version)}" if data.version else ""
    verdict = f" Quality gate: **{_inline(data.verdict)}**." if data.verdict else ""
    return f"{base}{made}.{verdict}"


def _scheme_rows(data: CardData) -> list[list[str]]:
    return [[str(s.get("layers", "")), str(s.get("scheme", ""))] for s in data.schemes]


def _size(data: CardData) -> str:
    if not (data.original_bytes and data.artifact_bytes):
        return ""
    ratio = data.original_bytes / data.artifact_bytes
    rows = [
        ["original", f"{data.original_bytes / 2**20:.2f} MiB", "1.00"],
        ["this artifact", f"{data.artifact_bytes / 2**20:.2f} MiB", f"{1 / ratio:.3f}"],
    ]
    table = _table(["", "size", "fraction"], rows)
    bits = f"\n\nAverage over the compressed layers: {data.average_bits:.3f} bits per weight."
    return table + (bits if data.average_bits else "")


_METRICS = (
    ("perplexity of the original", "base_perplexity", ".4g"),
    ("perplexity", "perplexity", ".4g"),
    ("perplexity ratio", "perplexity_ratio", ".4f"),
    ("KL divergence, mean (nats)", "kl_mean", ".5f"),
    ("KL divergence, 99th percentile", "kl_p99", ".4f"),
    ("top-1 agreement", "top1_agreement", ".2%"),
)


def _quality(data: CardData) -> str:
    rows = [
        [label, _number(data.metrics.get(key), form), _interval(data.metrics, key, form)]
        for label, key, form in _METRICS
        if key in data.metrics
    ]
    if not rows:
        return "Not measured."
    tokens = data.metrics.get("num_tokens")
    note = f"\n\nOn {tokens} tokens, the same ones for both models." if tokens else ""
    return _table(["metric", "value", "95 % interval"], rows) + note


def _tasks(data: CardData) -> str:
    rows = [
        [name, str(t["num_items"]), *(_number(t[k], ".2%") for k in ("base_accuracy", "accuracy")),
         _interval(t, "delta", "+.2%"), str(t["lost"] + t["won"])]
        for name, t in data.tasks.items()
    ]  # fmt: skip
    return _table(["task", "items", "original", "this", "change, 95 %", "flips"], rows)


def _number(value: Any, form: str) -> str:
    finite = isinstance(value, (int, float)) and math.isfinite(value)
    return format(value, form) if finite else "–"


def _interval(values: Mapping[str, Any], key: str, form: str) -> str:
    ends = values.get(f"{key}_ci") or (None, None)
    return "" if None in ends else f"{_number(ends[0], form)} … {_number(ends[1], form)}"


def _loading(data: CardData) -> str:
    name = re.sub(r"[^\w.-]", "-", data.name)
    transformers = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")'
    )
    parts = [
        "With transformers (needs `pip install compressed-tensors`):",
        _code(transformers, "python"),
        "With vLLM:",
        _code(f"vllm serve ./{name}", "bash"),
        "With compressor's own server (OpenAI-compatible):",
        _code(f"compress serve ./{name}", "bash"),
    ]
    kernels = ["`kernels/` holds compiled GPU kernels and the launcher that the server can use."]
    return "\n\n".join(parts + kernels * data.has_kernels)


def _limitations(data: CardData) -> str:
    known = [
        "Errors and biases of the original remain; compression adds small ones of its own, "
        "which averages can hide.",
        *data.limitations,
    ]
    if data.calibration:
        known.append(f"Calibrated on {data.calibration}; other text may lose more.")
    if not data.tasks:
        known.append("No downstream task was measured.")
    return "\n".join(f"- {_inline(item)}" for item in known)


def _licence(data: CardData) -> str:
    if data.licence:
        return f"That of the base model: {_inline(data.licence)}."
    return "The base model states none; its terms apply to this artifact too."


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *([_inline(c) for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _code(text: str, language: str) -> str:
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    fence = max(fence, "```", key=len)
    return f"{fence}{language}\n{text}\n{fence}"


def _inline(text: str) -> str:
    """Text as text: no path, no markup, no line break, no table cell border."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", printable(redact(text), limit=400))
