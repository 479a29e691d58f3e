"""Is this artifact fit to be served? Load it, run it every way the server does, compare, time it.

Each check says what it found; "ok" is their conjunction. Greedy texts are compared with
transformers' own `generate` on the same packed model, one prompt at a time. Where they part, the
two tokens' logits are looked at: closer than rounding explains is a tie, anything else a failure.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from compressor.modeling.packed_linear import rounds_inputs
from compressor.serve.client import Client
from compressor.serve.engine import LLMEngine
from compressor.serve.kv_format import resolve
from compressor.serve.offline import LLM
from compressor.serve.options import ServeOptions
from compressor.serve.sequence import SamplingParams

_TEXTS = (
    "The quick brown fox",
    "def add(a, b):\n    return",
    "Once upon a time there was a small village at the edge of a forest, and",
    "1 2 3 4 5 6 7",
)
_RESIDENT_TOLERANCE = 0.03
_TIE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}  # logits


@dataclass(frozen=True, slots=True)
class Check:
    """One finding."""

    name: str
    ok: bool
    detail: str


@dataclass(slots=True)
class Subject:
    """The loaded artifact and what its checks share."""

    loaded: Any
    options: ServeOptions
    new_tokens: int
    prompts: list[list[int]] = field(default_factory=list)
    expected: list[list[int]] = field(default_factory=list)
    speed: dict[str, float] = field(default_factory=dict)

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=self.new_tokens)


def run_smoke(
    path: Path, options: ServeOptions | None = None, *, new_tokens: int = 24
) -> dict[str, Any]:
    """Check a model folder; {"path", "ok", "checks", "speed", "notes"}.

    Raises CheckpointError or UnsupportedError when it cannot be loaded at all.
    """
    from compressor.modeling.load import load_model
    from compressor.serve.integrity import check_digests
    from compressor.serve.server import device_of, dtype_of

    options = options or ServeOptions()
    notes = [check_digests(Path(path))] if options.verify else []
    loaded = load_model(
        Path(path),
        device=device_of(options),
        dtype=dtype_of(options),
        cpu_activations=options.cpu_activations,
    )
    subject = Subject(loaded, resolve(options, loaded.checkpoint.config), new_tokens)
    subject.prompts = _prompts(loaded)
    checks = [check for function in CHECKS for check in function(subject)]
    return {
        "path": str(path),
        "ok": all(c.ok for c in checks),
        "checks": [asdict(c) for c in checks],
        "speed": subject.speed,
        "notes": [*notes, *loaded.notes],
    }


def _prompts(loaded: Any) -> list[list[int]]:
    if loaded.tokenizer is None:
        return [[1, 2, 3], [4, 5]]
    return [loaded.tokenizer.encode(text) for text in _TEXTS]


def check_resident(subject: Subject) -> Iterator[Check]:
    """Packed weights must stay packed in memory."""
    resident, packed = subject.loaded.resident_bytes, subject.loaded.packed_bytes
    if not packed:
        yield Check("resident bytes", True, "no packed weights: a dense model")
        return
    ok = abs(resident - packed) <= _RESIDENT_TOLERANCE * packed
    yield Check("resident bytes", ok, f"{resident} in memory, {packed} on disk")


def check_tokenizer(subject: Subject) -> Iterator[Check]:
    """Tokenizer, chat template and end-of-text ids."""
    from compressor.modeling.endings import end_of_text_ids

    model, tokenizer = subject.loaded.model, subject.loaded.tokenizer
    yield Check("tokenizer", tokenizer is not None, type(tokenizer).__name__)
    vocab = int(model.config.get_text_config().vocab_size)
    eos = sorted(end_of_text_ids(model, tokenizer))
    in_vocab = bool(eos) and all(0 <= i < vocab for i in eos)
    yield Check("end-of-text ids", in_vocab, f"{eos} in a vocabulary of {vocab}")
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": "Hi"}]
        try:
            text = tokenizer.apply_chat_template(
                message, tokenize=False, add_generation_prompt=True
            )
            yield Check("chat template", "Hi" in text, repr(text)[:200])
        except Exception as error:  # a template may raise anything
            yield Check("chat template", False, f"{type(error).__name__}: {error}")
    else:
        yield Check("chat template", True, "none: /v1/chat/completions will answer 400")


def check_parity(subject: Subject) -> Iterator[Check]:
    """Greedy tokens: alone and in a batch, with and without prefix cache, in small chunks.

    Keys and values are kept in the model's dtype for it, as `generate` keeps them; what a pool of
    codes does is compared when an engine opens.
    """
    exact = replace(subject.options, kv_cache_dtype="auto")
    subject.expected = [_generate(subject, p) for p in subject.prompts]
    longest = max(len(p) for p in subject.prompts) + subject.new_tokens
    tight = replace(exact, max_num_batched_tokens=8, max_num_seqs=4, num_blocks=None)
    variants = {
        "alone": (exact, 1),
        "in a batch": (exact, len(subject.prompts)),
        "without prefix cache": (replace(exact, prefix_cache=False), 4),
        "chunked, small pool": (
            replace(tight, num_blocks=-(-longest // tight.block_size) + 1, max_model_len=None),
            4,
        ),
    }
    for name, (options, batch) in variants.items():
        answers = _run(subject, options, batch)
        found = [_difference(subject, i, a) for i, a in enumerate(answers)]
        wrong = [d for d in found if d and not d.startswith("tie")]
        detail = "; ".join(d for d in found if d) or "equal to generate"
        yield Check(f"greedy parity {name}", not wrong, detail)


def _run(subject: Subject, options: ServeOptions, batch: int) -> list[list[int]]:
    engine = LLMEngine(subject.loaded.model, subject.loaded.tokenizer, options)
    with LLM(engine) as llm:
        answers = []
        for start in range(0, len(subject.prompts), batch):
            answers += llm.generate(subject.prompts[start : start + batch], subject.params)
        return [a.token_ids for a in answers]


@torch.inference_mode()
def _generate(subject: Subject, prompt: list[int]) -> list[int]:
    model = subject.loaded.model
    ids = torch.tensor([prompt], device=model.device)
    plain: dict[str, Any] = {"do_sample": False, "num_beams": 1, "use_cache": True}
    plain |= {"temperature": None, "top_p": None, "top_k": None, "attention_mask": ids >= 0}
    out = model.generate(ids, max_new_tokens=subject.new_tokens, **plain)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@torch.inference_mode()
def _difference(subject: Subject, index: int, found: list[int]) -> str:
    """Where two greedy texts part ("tie ..." when rounding explains it); "" when they agree."""
    expected, model = subject.expected[index], subject.loaded.model
    if found == expected:
        return ""
    pairs = zip(expected, found, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if place is None:
        return f"prompt {index}: {len(found)} tokens instead of {len(expected)}"
    context = subject.prompts[index] + expected[:place]
    logits = model(torch.tensor([context], device=model.device), use_cache=False).logits[0, -1]
    gap = abs(float(logits[expected[place]] - logits[found[place]]))
    if gap <= (0.1 if rounds_inputs(model) else _TIE.get(model.dtype, 0.1)):
        return f"tie at token {place} of prompt {index} ({gap:.1g})"
    return f"prompt {index}: token {place} differs, logits {gap:.3g} apart"


def check_prefix_and_stream(subject: Subject) -> Iterator[Check]:
    """Repeated prompts hit the cache and change nothing; a stream says what a whole answer says."""
    from compressor.serve.server import background_server

    if subject.loaded.tokenizer is None:
        return
    options = replace(subject.options, api_key=None, host="127.0.0.1", served_model_name=None)
    engine = LLMEngine(subject.loaded.model, subject.loaded.tokenizer, options)
    with background_server(engine, options) as port:
        client = Client("127.0.0.1", port)
        long = (subject.prompts[2] * options.block_size)[: options.block_size * 2 + 1]
        body = {"prompt": long, "temperature": 0, "max_tokens": subject.new_tokens}
        first, second = (client.post("/v1/completions", body) for _ in range(2))
        streamed = [e for _, e in client.stream("/v1/completions", body)]
    whole = first["choices"][0]["text"]
    hits = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    same = second["choices"][0]["text"] == whole
    wanted = 2 * options.block_size if options.prefix_cache else 0
    yield Check("prefix cache", same and hits == wanted, f"{hits} of {len(long)} tokens reused")
    joined = "".join(e["choices"][0]["text"] for e in streamed if e["choices"])
    detail = json.dumps(whole)[:80] if joined == whole else f"{joined!r} is not {whole!r}"[:200]
    yield Check("stream equals whole answer", joined == whole, detail)


def check_speed(subject: Subject) -> Iterator[Check]:
    """Decode speed of one sequence, and the weight bytes read for it."""
    engine = LLMEngine(subject.loaded.model, subject.loaded.tokenizer, subject.options)
    params = replace(subject.params, ignore_eos=True)
    with LLM(engine):
        engine.add_request("speed", subject.prompts[0], params)
        engine.step()
        started, steps = time.perf_counter(), 0
        while engine.has_work:
            engine.step()
            steps += 1
        pool = engine.runner.kept
    rate = steps / (time.perf_counter() - started)
    subject.speed["tokens_per_s"] = rate
    subject.speed["weight_gb_per_s"] = rate * subject.loaded.weight_bytes / 1e9
    yield Check("speed", True, f"{rate:.1f} tokens/s, keys and values in {pool}")


CHECKS: tuple[Callable[[Subject], Iterator[Check]], ...] = (
    check_resident,
    check_tokenizer,
    check_parity,
    check_prefix_and_stream,
    check_speed,
)
