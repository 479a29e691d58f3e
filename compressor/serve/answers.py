"""Deltas to the JSON that OpenAI's clients read: choices, log-probabilities, usage, chunks.

Whole answers and streams are made from the same pieces, so they cannot differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from compressor.serve.sequence import Delta, TokenLogprob

Kind = Literal["completion", "chat"]
TokenText = Callable[[int], str]
Json = dict[str, Any]


@dataclass(slots=True)
class Piece:
    """What one delta adds to one choice."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: list[TokenLogprob | None]
    finish_reason: str | None


@dataclass(slots=True)
class Choice:
    """One answer as it grows.

    Attributes:
        echo: text of the prompt, shown before the first piece; "" when not asked for.
        offset: characters before the next token (legacy `text_offset`).
    """

    index: int
    prompt: Sequence[int]
    echo: str = ""
    pieces: list[Piece] = field(default_factory=list)
    num_tokens: int = 0
    num_cached: int = 0
    offset: int = 0

    def add(self, delta: Delta) -> Piece:
        """Note a delta and return it as a piece to show."""
        logprobs: list[TokenLogprob | None] = list(delta.logprobs)
        if delta.prompt_logprobs is not None:
            logprobs = [*delta.prompt_logprobs, *logprobs]
        text = delta.text if self.pieces else self.echo + delta.text
        piece = Piece(text, delta.token_ids, logprobs, delta.finish_reason)
        self.pieces.append(piece)
        self.num_tokens += len(delta.token_ids)
        self.num_cached = max(self.num_cached, delta.num_cached_tokens)
        return piece

    def whole(self) -> Piece:
        """All pieces as one."""
        return Piece(
            "".join(p.text for p in self.pieces),
            tuple(t for p in self.pieces for t in p.token_ids),
            [entry for p in self.pieces for entry in p.logprobs],
            self.pieces[-1].finish_reason,
        )


@dataclass(frozen=True, slots=True)
class Writer:
    """Makes the JSON of one request's answer.

    Attributes:
        kind: which of the two APIs.
        token_text: text of one token id.
        wants_logprobs: whether choices carry log-probabilities.
    """

    kind: Kind
    request_id: str
    model: str
    created: int
    token_text: TokenText
    wants_logprobs: bool

    def answer(self, choices: list[Choice], num_prompt_tokens: int) -> Json:
        """The whole answer."""
        body = [self._choice(c, c.whole()) for c in choices]
        used = usage(choices, num_prompt_tokens)
        return {**self._head(stream=False), "choices": body, "usage": used}

    def chunk(self, choice: Choice, piece: Piece, used: Json | None = None) -> str:
        """One event of a stream."""
        body = {**self._head(stream=True), "choices": [self._choice(choice, piece, stream=True)]}
        return event({**body, "usage": used} if used else body)

    def role_chunk(self, choice: Choice) -> str:
        """The first event of a chat choice."""
        body = {
            "index": choice.index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return event({**self._head(stream=True), "choices": [body]})

    def usage_chunk(self, used: Json) -> str:
        """The last event, when `include_usage` was asked for."""
        return event({**self._head(stream=True), "choices": [], "usage": used})

    def _head(self, *, stream: bool) -> Json:
        kind = "text_completion"
        if self.kind == "chat":
            kind = "chat.completion.chunk" if stream else "chat.completion"
        prefix = "chatcmpl" if self.kind == "chat" else "cmpl"
        return {
            "id": f"{prefix}-{self.request_id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def _choice(self, choice: Choice, piece: Piece, *, stream: bool = False) -> Json:
        body: Json = {"index": choice.index}
        if self.kind == "completion":
            body["text"] = piece.text
        elif stream:
            body["delta"] = {"content": piece.text}
        else:
            body["message"] = {"role": "assistant", "content": piece.text, "refusal": None}
        body["logprobs"] = self._logprobs(choice, piece) if self.wants_logprobs else None
        body["finish_reason"] = piece.finish_reason
        return body

    def _logprobs(self, choice: Choice, piece: Piece) -> Json:
        if self.kind == "chat":
            return {"content": [self._chat_entry(e) for e in piece.logprobs if e is not None]}
        names, offsets = [], []
        for entry in piece.logprobs:
            names.append(self.token_text(choice.prompt[0] if entry is None else entry.token_id))
            offsets.append(choice.offset)
            choice.offset += len(names[-1])
        return {
            "tokens": names,
            "token_logprobs": [None if e is None else e.logprob for e in piece.logprobs],
            "top_logprobs": [None if e is None else self._legacy_top(e) for e in piece.logprobs],
            "text_offset": offsets,
        }

    def _legacy_top(self, entry: TokenLogprob) -> dict[str, float]:
        """Texts to log-probabilities; of two tokens with one text the likelier stays."""
        table: dict[str, float] = {}
        for token, value in [*entry.top, (entry.token_id, entry.logprob)]:
            table.setdefault(self.token_text(token), value)
        return table

    def _chat_entry(self, entry: TokenLogprob) -> Json:
        top = [self._named(token, value) for token, value in entry.top]
        return {**self._named(entry.token_id, entry.logprob), "top_logprobs": top}

    def _named(self, token: int, value: float) -> Json:
        text = self.token_text(token)
        return {"token": text, "logprob": value, "bytes": list(text.encode())}


def usage(choices: Iterable[Choice], num_prompt_tokens: int) -> Json:
    """Token counts of the whole request."""
    choices = list(choices)
    produced = sum(c.num_tokens for c in choices)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": produced,
        "total_tokens": num_prompt_tokens + produced,
        "prompt_tokens_details": {"cached_tokens": sum(c.num_cached for c in choices)},
    }


def event(body: Json) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
