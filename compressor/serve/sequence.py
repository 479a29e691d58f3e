"""One request inside the engine: its tokens, its blocks, how far it is, and what it asked for.

Invariants of a `Sequence`: `num_computed <= len(tokens)`; the keys and values of tokens
`0 .. num_computed-1` lie in `block_table`; the last token is never computed before it is scheduled,
so at least one query token remains (a prefix hit is capped at `len(tokens) - 1`).
"""

from __future__ import annotations

import hashlib
import math
import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from compressor.errors import UsageError

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen, and when to end.

    Attributes:
        temperature: 0 is greedy.
        top_p: nucleus mass kept; 1 keeps all.
        top_k: number of tokens kept; 0 keeps all.
        min_p: tokens below `min_p * max probability` are dropped.
        presence_penalty, frequency_penalty: subtracted from the logits of tokens already produced,
            once, and once per occurrence (OpenAI's definition).
        logit_bias: (token id, value) pairs added to the logits.
        seed: same seed and prompt give the same tokens in any batch; None draws one.
        max_tokens: most tokens to produce; 0 only makes sense with `prompt_logprobs`.
        min_tokens: no end-of-text token before this many tokens.
        stop: strings that end the text; they are not part of it.
        stop_token_ids: token ids that end it.
        ignore_eos: go on after the end-of-text token (benchmarks).
        logprobs: number of alternatives reported per produced token; None reports nothing.
        prompt_logprobs: the same for the tokens of the prompt.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        bounds = {
            "temperature": 0 <= self.temperature < math.inf,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "min_p": 0 <= self.min_p <= 1,
            "max_tokens": self.max_tokens >= 0,
            "min_tokens": 0 <= self.min_tokens <= self.max_tokens,
            "stop": all(self.stop),
        }
        for name, holds in bounds.items():
            if not holds:
                raise UsageError(f"{name} is out of range: {getattr(self, name)}", code="SV10")

    @property
    def changes_logits(self) -> bool:
        """Whether logits must be edited before a token is chosen."""
        return bool(self.presence_penalty or self.frequency_penalty or self.logit_bias)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token (natural log, raw logits) and of the most likely ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one request."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    error: str = ""
    num_cached_tokens: int = 0


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one request; the scheduler owns `block_table` and `num_computed`."""

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int = 0
    tokens: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str = ""
    arrival: float = field(default_factory=time.monotonic)
    first_scheduled: float | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]  # nothing predicts the first token

    @property
    def num_remaining(self) -> int:
        """Tokens whose keys and values are not in the pool yet."""
        return len(self.tokens) - self.num_computed

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """True while log-probabilities of the prompt are still missing."""
        return 0 < len(self.prompt_logprobs) < len(self.prompt)

    def prompt_rows(self, start: int, stop: int) -> range:
        """Positions in [start, stop) whose logits give a missing prompt log-probability."""
        if not self.wants_prompt_logprobs:
            return range(0)
        return range(max(start, len(self.prompt_logprobs) - 1), min(stop, len(self.prompt) - 1))

    def hashes_upto(self, num_blocks: int, block_size: int, root: bytes) -> list[bytes]:
        """Chained digests of the first `num_blocks` full blocks (kept, they never change)."""
        known = len(self.block_hashes)
        for index in range(known, num_blocks):
            parent = self.block_hashes[-1] if self.block_hashes else root
            ids = self.tokens[index * block_size : (index + 1) * block_size]
            self.block_hashes.append(hash_block(parent, ids))
        return self.block_hashes[:num_blocks]


def hash_block(parent: bytes, ids: Iterable[int]) -> bytes:
    """sha256(parent || ids as int64): equal only when all tokens up to here are equal."""
    return hashlib.sha256(parent + array("q", ids).tobytes()).digest()
