"""The engine without a server: prompts in, texts out, batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from compressor.errors import CompressError, UnsupportedError
from compressor.serve.engine import LLMEngine
from compressor.serve.options import ServeOptions
from compressor.serve.sequence import FinishReason, SamplingParams, TokenLogprob

OnText = Callable[[int, str], None]


@dataclass(slots=True)
class GeneratedText:
    """One answer."""

    prompt: tuple[int, ...]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0


class LLM:
    """A model ready to generate; close it, or use it in a `with` block.

    Args:
        engine: owned from now on.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine

    @classmethod
    def open(cls, path: Path, options: ServeOptions | None = None) -> Self:
        """Load a folder (errors as in `serve`)."""
        from compressor.serve.server import open_engine

        return cls(open_engine(path, options or ServeOptions()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.engine.close()

    def encode(self, prompt: str, *, chat: bool = False) -> list[int]:
        """Token ids of a text, or of one user message through the chat template."""
        tokenizer = self.engine.tokenizer
        if not chat:
            ids: list[int] = tokenizer.encode(prompt)
            return ids
        if not getattr(tokenizer, "chat_template", None):
            raise UnsupportedError("this model has no chat template", code="SV33")
        message = {"role": "user", "content": prompt}
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        rendered: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return rendered

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        on_text: OnText | None = None,
    ) -> list[GeneratedText]:
        """Answers in the order of the prompts (token ids).

        Args:
            prompts: token ids of each.
            params: for all, or one for each.
            on_text: called with (index, text) as texts grow.

        Raises UsageError when a prompt cannot fit, CompressError when a request fails.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        answers = [GeneratedText(tuple(p)) for p in prompts]
        for prompt, own in zip(prompts, each, strict=True):
            self.engine.validate(prompt, own)
        for index, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
            self.engine.add_request(str(index), prompt, own)
        try:
            while self.engine.has_work:
                self._step(answers, on_text)
        finally:
            self.engine.abort([str(i) for i in range(len(prompts))])
        return answers

    def _step(self, answers: list[GeneratedText], on_text: OnText | None) -> None:
        for delta in self.engine.step():
            index = int(delta.request_id)
            if delta.finish_reason == "error":
                raise CompressError(f"prompt {index} failed: {delta.error}", code="SV23")
            answer = answers[index]
            answer.text += delta.text
            answer.token_ids += delta.token_ids
            answer.logprobs += delta.logprobs
            answer.finish_reason = delta.finish_reason
            answer.num_cached_tokens = delta.num_cached_tokens
            if on_text is not None and delta.text:
                on_text(index, delta.text)


def generate_text(
    path: Path,
    prompts: Sequence[str],
    *,
    params: SamplingParams | None = None,
    options: ServeOptions | None = None,
    chat: bool = False,
) -> list[GeneratedText]:
    """Load a folder and answer these texts (`chat`: each as one user message).

    Raises what `serve` raises before listening, and UsageError for prompts that cannot fit.
    """
    with LLM.open(path, options) as llm:
        ids = [llm.encode(prompt, chat=chat) for prompt in prompts]
        return llm.generate(ids, params or SamplingParams(max_tokens=128))
