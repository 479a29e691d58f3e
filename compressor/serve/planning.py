"""From a checked body to the sequences that answer it: prompts, templates, limits, choices."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from compressor.errors import UsageError
from compressor.serve.answers import Choice, Kind, Writer
from compressor.serve.protocol import ApiError, ChatRequest, CompletionRequest, TokenizeRequest
from compressor.serve.sequence import SamplingParams
from compressor.serve.serving import Serving
from compressor.serve.worker import Job

_SEED_MASK = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and the text to show before the answer."""

    ids: Sequence[int]
    echo: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """A request ready to run: one job and one choice per sequence."""

    jobs: list[Job]
    choices: list[Choice]
    num_prompt_tokens: int
    writer: Writer


async def plan_completion(serving: Serving, request_id: str, asked: CompletionRequest) -> Plan:
    """Sequences of a `/v1/completions` body."""
    echo, n = bool(asked.echo), asked.n or 1
    max_tokens = 16 if asked.max_tokens is None else asked.max_tokens
    if max_tokens == 0 and not echo:
        raise ApiError(400, "max_tokens: must be at least 1 without echo", param="max_tokens")
    if asked.best_of not in (None, n):
        raise ApiError(400, "best_of: only best_of = n is supported", param="best_of")
    texts = asked.prompts()
    serving.check_capacity(len(texts) * n)
    params = asked.params(
        max_tokens, logprobs=asked.logprobs, prompt_logprobs=asked.logprobs if echo else None
    )
    special = asked.add_special_tokens
    prompts = [await _prompt(serving, t, echo=echo, special=special) for t in texts]
    return _plan(serving, request_id, prompts=prompts, params=params, asked=asked)


async def plan_chat(serving: Serving, request_id: str, asked: ChatRequest) -> Plan:
    """Sequences of a `/v1/chat/completions` body; without a limit it may fill the context."""
    if asked.top_logprobs and not asked.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs = true", param="top_logprobs")
    if asked.max_tokens == 0:
        raise ApiError(400, "max_tokens: must be at least 1", param="max_tokens")
    ids = await chat_ids(serving, asked)
    room = max(serving.engine.max_model_len - len(ids), 1)
    max_tokens = asked.max_completion_tokens or asked.max_tokens or room
    params = asked.params(
        max_tokens, logprobs=(asked.top_logprobs or 0) if asked.logprobs else None
    )
    return _plan(serving, request_id, prompts=[Prompt(ids)], params=params, asked=asked)


async def chat_ids(serving: Serving, asked: ChatRequest | TokenizeRequest) -> list[int]:
    """Token ids of messages through the chat template."""
    text = await serving.texts.render(
        asked.messages or [],
        generation_prompt=asked.add_generation_prompt,
        extra=asked.chat_template_kwargs or {},
    )
    return await serving.texts.encode(text, add_special_tokens=False)


async def _prompt(
    serving: Serving, prompt: str | list[int], *, echo: bool, special: bool
) -> Prompt:
    if isinstance(prompt, str):
        ids = await serving.texts.encode(prompt, add_special_tokens=special)
        return Prompt(ids, prompt if echo else "")
    if len(prompt) > serving.engine.max_model_len:
        raise ApiError(400, "the prompt is longer than the model's context", param="prompt")
    return Prompt(prompt, serving.texts.decode(prompt) if echo else "")


def _plan(
    serving: Serving,
    request_id: str,
    *,
    prompts: list[Prompt],
    params: SamplingParams,
    asked: CompletionRequest | ChatRequest,
) -> Plan:
    n = asked.n or 1
    for prompt in prompts:
        _validate(serving, prompt.ids, params)
    jobs, choices = [], []
    for index in range(len(prompts) * n):
        prompt = prompts[index // n]
        seed = None if params.seed is None else (params.seed + index % n) & _SEED_MASK
        jobs.append(Job(f"{request_id}-{index}", prompt.ids, replace(params, seed=seed)))
        choices.append(Choice(index, prompt.ids, prompt.echo))
    kind: Kind = "chat" if isinstance(asked, ChatRequest) else "completion"
    writer = Writer(
        kind,
        request_id,
        serving.model_name,
        int(time.time()),
        serving.texts.name,
        params.logprobs is not None,
    )
    serving.check_capacity(len(jobs))
    return Plan(jobs, choices, sum(len(p.ids) for p in prompts), writer)


def _validate(serving: Serving, ids: Sequence[int], params: SamplingParams) -> None:
    try:
        serving.engine.validate(ids, params)
    except UsageError as error:
        raise ApiError(400, error.message, code="context_length_exceeded") from None
