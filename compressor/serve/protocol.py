"""What a request may say: strict models of the OpenAI API, and the reading of the body.

Nothing is guessed and nothing is dropped in silence: a wrong type or a value out of range gets 400
with the bound, a field of the API that is not supported gets 400 with its name, a field nobody
knows gets a `warning` header (or 400 with `strict_api`).
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from compressor.serve.engine import MAX_LOGPROBS
from compressor.serve.sequence import SamplingParams

MAX_CHOICES = 16
MAX_TOKENS = 2**20
MAX_STOPS = 16
_SEED = 2**63
StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]

# Accepted because they cannot change the answer.
HARMLESS = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "parallel_tool_calls",
}  # fmt: skip
# Known, not supported: only these values, which ask for nothing, pass.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "prompt_logprobs": (),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "repetition_penalty": (1.0,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "truncate_prompt_tokens": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "continue_final_message": (False,),
    "documents": ([],),
    "reasoning_effort": (),
    "priority": (0,),
}


class ApiError(Exception):
    """An answer with an OpenAI-shaped error body.

    Args:
        status: HTTP status.
        message: for the caller.
        param: the field it is about.
        code: machine-readable reason such as "model_not_found".
        headers: extra response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @classmethod
    def read(cls, body: bytes) -> Self:
        """Parse and check a body; ApiError 400 with the first problem."""
        data = read_json(body)
        if not isinstance(data, dict):
            raise ApiError(400, "the body must be a JSON object")
        try:
            request = cls.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            param = ".".join(str(part) for part in first["loc"])
            raise ApiError(400, f"{param}: {first['msg']}", param=param) from None
        return request

    def unknown_fields(self) -> list[str]:
        """Fields that nobody knows; ApiError 400 for known ones that ask for too much."""
        extra = self.model_extra or {}
        for name, value in extra.items():
            passes = value is None or any(_same(value, v) for v in NEUTRAL.get(name, (value,)))
            if not passes:
                raise ApiError(400, f"{name} is not supported by this server", param=name)
        return [n for n in extra if n not in NEUTRAL and n not in HARMLESS]


def _same(value: Any, neutral: Any) -> bool:
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


class StreamOptions(_Strict):
    """`stream_options`: usage in a last chunk, or in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _Generation(_Strict):
    model: str | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    min_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(None, ge=-_SEED, lt=_SEED)
    stop: StopString | list[StopString] | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOPS)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def params(
        self, max_tokens: int, *, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """The engine's settings."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > MAX_STOPS:
            raise ApiError(400, f"stop has {len(stop)} strings, at most {MAX_STOPS}", param="stop")
        if (self.min_tokens or 0) > max_tokens:
            raise ApiError(400, "min_tokens is above max_tokens", param="min_tokens")
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=_biases(self.logit_bias or {}),
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


def _biases(table: dict[str, float]) -> tuple[tuple[int, float], ...]:
    if not all(key.isascii() and key.isdigit() and len(key) < 10 for key in table):
        raise ApiError(400, "logit_bias: keys must be token ids", param="logit_bias")
    return tuple((int(key), value) for key, value in table.items())


class CompletionRequest(_Generation):
    """Body of `/v1/completions`."""

    prompt: Any
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool = True

    def prompts(self) -> list[str | list[int]]:
        """The prompt field as a list of texts and token lists."""
        value = self.prompt
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and value:
            if all(_is_token(v) for v in value):
                return [value]
            if all(isinstance(v, str) or _is_token_list(v) for v in value):
                return value
        raise ApiError(
            400,
            "prompt: must be a string, a list of strings, a list of token ids or a list of those",
            param="prompt",
        )


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_token(v) for v in value)


class ChatRequest(_Generation):
    """Body of `/v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, bool | int | float | str] | None = None


class TokenizeRequest(_Strict):
    """Body of `/tokenize`: a text, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, bool | int | float | str] | None = None


class DetokenizeRequest(_Strict):
    """Body of `/detokenize`."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(max_length=2**17)


def read_json(body: bytes) -> Any:
    """The body as JSON, without what JSON does not have: NaN, Infinity, 1e999, lone surrogates,
    repeated keys, endless nesting. ApiError 400 names the place."""
    try:
        text = body.decode("utf-8")
        data = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_without_repeats,
        )
        if "\\u" in text:
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise ApiError(400, f"the body is not valid JSON: {error.msg} at {place}") from None
    except UnicodeEncodeError:
        raise ApiError(400, "the body holds a lone surrogate, which is not a character") from None
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    return data


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text[:20]} is too large")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("an object has the same key twice")
    return table
