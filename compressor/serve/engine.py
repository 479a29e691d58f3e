"""The engine: requests in, one step at a time, pieces of answers out.

    step:  schedule -> run the model on one flat batch -> sample -> note what ended

A step that raises is repeated one sequence at a time, so that only the request which causes the
failure gets it; the writes of a step into the pool are idempotent, so repeating is safe. Not for
use from several threads: `EngineThread` (worker.py) owns it in the server.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Collection, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor

from compressor.errors import ResourceError, UsageError
from compressor.modeling.endings import end_of_text_ids
from compressor.serve.block_pool import BlockPool
from compressor.serve.detokenize import Detokenizer
from compressor.serve.graphs import CudaCapture, warm_sizes
from compressor.serve.options import ServeOptions
from compressor.serve.packed_experts import pack_experts
from compressor.serve.runner import ModelRunner, Rows
from compressor.serve.sampler import sample, token_logprobs
from compressor.serve.scheduler import Scheduled, Scheduler
from compressor.serve.sequence import Delta, SamplingParams, TokenLogprob
from compressor.serve.sequence import Sequence as Request

MAX_LOGPROBS = 20


class LLMEngine:
    """Continuous batching over one model.

    Args:
        model: a transformers causal language model in evaluation mode, on its device; its
            attention is replaced until `close`.
        tokenizer: decodes the output; None leaves all texts empty.
        options: sizes; None of them is changed later.

    Raises UnsupportedError (SV33) for models whose attention cannot be paged, ResourceError when
    no block fits into memory.
    """

    def __init__(self, model: Any, tokenizer: Any, options: ServeOptions | None = None) -> None:
        self.options = options = options or ServeOptions()
        self.tokenizer = tokenizer
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.eos_ids = end_of_text_ids(model, tokenizer)
        self.notes = pack_experts(model)
        self.runner = ModelRunner(model, options.kv_cache_dtype)
        try:
            num_blocks = self._num_blocks()
            self.runner.open_pool(num_blocks, options.block_size)
            self.notes.append(self._pool_note(num_blocks))
            self.max_model_len = self._max_model_len(model, num_blocks)
            if options.self_check:
                error = self.runner.self_check(self.vocab_size)
                self.notes.append(f"paged attention differs from plain by {error:.1e} (relative)")
            if self.runner.device.type == "cuda":
                self.notes += self._prepare_gpu()
        except BaseException:
            self.runner.close()
            raise
        self.pool = BlockPool(num_blocks, options.block_size, prefix_cache=options.prefix_cache)
        self.scheduler = Scheduler(
            self.pool,
            token_budget=options.token_budget(self.runner.device.type),
            max_num_seqs=options.max_num_seqs,
            cache_root=fingerprint(model),
        )
        self.consecutive_failures = 0
        self._requests: dict[str, Request] = {}
        self._texts: dict[str, Detokenizer] = {}

    def close(self) -> None:
        """Give the model its own attention back; unfinished requests are dropped."""
        self.abort(list(self._requests))
        self.runner.close()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def validate(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise UsageError (SV09) when this request can never run."""
        total = len(prompt) + params.max_tokens
        if not prompt:
            raise UsageError("the prompt is empty", code="SV09")
        if total > self.max_model_len:
            raise UsageError(
                f"this model's maximum context length is {self.max_model_len} tokens; the prompt "
                f"has {len(prompt)} and max_tokens is {params.max_tokens}",
                code="SV09",
            )
        if any(not 0 <= t < self.vocab_size for t in prompt):
            raise UsageError(f"token ids must be in [0, {self.vocab_size})", code="SV09")
        if any(not 0 <= t < self.vocab_size for t, _ in params.logit_bias):
            raise UsageError(f"logit_bias ids must be in [0, {self.vocab_size})", code="SV09")

    def add_request(self, request_id: str, prompt: Sequence[int], params: SamplingParams) -> None:
        """Queue a request (checked as in `validate`)."""
        self.validate(prompt, params)
        if request_id in self._requests:
            raise UsageError(f"request {request_id} exists", code="SV09")
        seed = secrets.randbits(63) if params.seed is None else params.seed
        request = Request(request_id, tuple(prompt), params, seed)
        self._requests[request_id] = request
        if self.tokenizer is not None:
            self._texts[request_id] = Detokenizer(self.tokenizer, request.prompt, params.stop)
        self.scheduler.add(request)

    def abort(self, request_ids: Collection[str]) -> list[Delta]:
        """Drop requests now; unknown ids are ignored. Returns their last pieces."""
        found = [self._requests[i] for i in request_ids if i in self._requests]
        for request in found:
            request.finish_reason = "abort"
        return [self._end(r) for r in found]

    def step(self) -> list[Delta]:
        """Run one step; returns what it added to each request."""
        items = self.scheduler.schedule()
        if not items:
            return []
        deltas: list[Delta] = []
        outcomes = self._run_isolated(items)
        for item, outcome in zip(items, outcomes, strict=True):
            if isinstance(outcome, Exception):
                deltas.append(self._fail(item.sequence, outcome))
            else:
                self.scheduler.advance(item)
                deltas += self._collect(item, *outcome)
        failed = sum(isinstance(o, Exception) for o in outcomes)
        self.consecutive_failures = self.consecutive_failures + 1 if failed == len(items) else 0
        return deltas

    def _run_isolated(self, items: list[Scheduled]) -> list[_Outcome]:
        try:
            return self._run(items)
        except Exception as error:
            if len(items) == 1:
                return [error]
            return [self._run_isolated([item])[0] for item in items]

    def _run(self, items: list[Scheduled]) -> list[_Outcome]:
        logits, rows = self.runner.run(items)
        finite = logits.amax(dim=-1).isfinite().tolist()
        bad = [not all(finite[r.first : r.stop]) for r in rows]
        picked = [i for i, r in enumerate(rows) if r.sampled is not None and not bad[i]]
        index = [_sampled(rows[i]) for i in picked]
        sequences = [items[i].sequence for i in picked]
        tokens = sample(logits[index], sequences, self.eos_ids) if picked else []
        chosen = dict(zip(picked, tokens, strict=True))
        return [
            FloatingPointError("the model's logits are not finite")
            if bad[i]
            else (chosen.get(i), self._logprobs(item, rows[i], logits, chosen.get(i)))
            for i, item in enumerate(items)
        ]

    def _logprobs(
        self, item: Scheduled, rows: Rows, logits: Tensor, token: int | None
    ) -> tuple[list[TokenLogprob], TokenLogprob | None]:
        """Log-probabilities of the prompt rows and of the new token, where asked for."""
        sequence, params = item.sequence, item.sequence.params
        prompt: list[TokenLogprob] = []
        if rows.num_prompt:
            targets = [sequence.tokens[p + 1] for p in sequence.prompt_rows(item.start, item.stop)]
            block = logits[rows.first : rows.first + rows.num_prompt]
            prompt = token_logprobs(block, targets, params.prompt_logprobs or 0)
        own = None
        if token is not None and params.logprobs is not None:
            row = logits[_sampled(rows) :][:1]
            own = token_logprobs(row, [token], params.logprobs)[0]
        return prompt, own

    def _collect(
        self,
        item: Scheduled,
        token: int | None,
        logprobs: tuple[list[TokenLogprob], TokenLogprob | None],
    ) -> list[Delta]:
        request = item.sequence
        request.prompt_logprobs += logprobs[0]
        if token is None:
            return []
        is_first = request.num_output == 0
        text = ""
        if request.params.max_tokens > 0:
            request.tokens.append(token)
            text = self._text_of(request, token)
        request.finish_reason = self._finish_reason(request, token)
        produced = (token,) if request.params.max_tokens > 0 else ()
        own = (logprobs[1],) if produced and logprobs[1] else ()
        prompt = tuple(request.prompt_logprobs) if is_first and request.prompt_logprobs else None
        if request.finish_reason is None:
            return [
                Delta(
                    request.request_id, produced, text, own, prompt,
                    num_cached_tokens=request.num_cached,
                )
            ]  # fmt: skip
        return [self._end(request, token_ids=produced, text=text, logprobs=own, prompt=prompt)]

    def _text_of(self, request: Request, token: int) -> str:
        detokenizer = self._texts.get(request.request_id)
        if detokenizer is None or self._ends_text(request, token):
            return ""
        return detokenizer.add(token)

    def _ends_text(self, request: Request, token: int) -> bool:
        params = request.params
        is_eos = token in self.eos_ids and not params.ignore_eos
        return is_eos or token in params.stop_token_ids

    def _finish_reason(self, request: Request, token: int) -> Any:
        detokenizer = self._texts.get(request.request_id)
        if request.params.max_tokens == 0:
            return "length"
        if self._ends_text(request, token) or (detokenizer is not None and detokenizer.stopped):
            return "stop"
        return "length" if request.num_output >= request.params.max_tokens else None

    def _end(
        self,
        request: Request,
        *,
        token_ids: tuple[int, ...] = (),
        text: str = "",
        logprobs: tuple[TokenLogprob, ...] = (),
        prompt: tuple[TokenLogprob | None, ...] | None = None,
    ) -> Delta:
        """Free everything of a finished request and make its last piece."""
        self.scheduler.finish(request)
        del self._requests[request.request_id]
        detokenizer = self._texts.pop(request.request_id, None)
        if detokenizer is not None and request.finish_reason in ("stop", "length"):
            text += detokenizer.finish()
            if detokenizer.stopped:
                request.finish_reason = "stop"
        return Delta(
            request.request_id, token_ids, text, logprobs, prompt,
            request.finish_reason, request.error, request.num_cached,
        )  # fmt: skip

    def _fail(self, request: Request, error: Exception) -> Delta:
        request.finish_reason = "error"
        request.error = f"{type(error).__name__}: {error}"
        return self._end(request)

    def _num_blocks(self) -> int:
        options, runner = self.options, self.runner
        if options.num_blocks is not None:
            return options.num_blocks
        per_block = runner.bytes_per_token * options.block_size
        size = options.kv_cache_bytes or free_memory_share(runner.device)
        blocks = size // per_block
        wanted = self._model_limit(runner.model) * options.max_num_seqs
        if options.kv_cache_bytes is None:
            blocks = min(blocks, -(-wanted // options.block_size))
        if blocks < 1:
            raise ResourceError(f"{size} bytes hold no block of {per_block} bytes", code="SV33")
        return int(blocks)

    def _pool_note(self, num_blocks: int) -> str:
        cache = self.runner.cache
        assert cache is not None
        size = f"{num_blocks} blocks, {cache.nbytes / 2**20:.0f} MiB"
        return f"key-value pool: {size}, {self.runner.kept}"

    def _prepare_gpu(self) -> list[str]:
        """Compile every kernel and record decode steps before the first request."""
        assert self.runner.cache is not None
        longest = min(self.max_model_len, self.runner.cache.num_slots)
        sizes = warm_sizes(min(self.options.token_budget("cuda"), longest))
        self.runner.warm_up(sizes)
        notes = [f"kernels compiled for {len(sizes)} numbers of tokens, up to {sizes[-1]}"]
        if self.options.cuda_graphs:
            most = self.options.max_num_seqs
            notes.append(self.runner.open_graphs(most, longest, CudaCapture()))
        return notes

    def _model_limit(self, model: Any) -> int:
        limit = position_limit(model.config)
        return min(limit, self.options.max_model_len or limit)

    def _max_model_len(self, model: Any, num_blocks: int) -> int:
        limit, asked = position_limit(model.config), self.options.max_model_len
        if asked is not None and asked > limit:
            raise UsageError(
                f"max_model_len {asked} is above the model's limit {limit}", code="SV33"
            )
        fits = num_blocks * self.options.block_size
        wanted = asked or limit
        if fits < wanted:
            self.notes.append(f"max_model_len lowered from {wanted} to {fits}: the pool's size")
        return min(wanted, fits)


_Outcome = Exception | tuple[int | None, tuple[list[TokenLogprob], TokenLogprob | None]]


def _sampled(rows: Rows) -> int:
    assert rows.sampled is not None
    return rows.sampled


def position_limit(config: Any) -> int:
    """Longest context whose position encoding does not depend on the other sequences.

    "dynamic" and "longrope" scaling change all positions once a text grows beyond the original
    length, which a batch of different lengths (and cached keys) cannot follow.
    """
    config = config.get_text_config()
    limit = int(getattr(config, "max_position_embeddings", None) or 2048)
    rope = getattr(config, "rope_parameters", None) or {}
    tables = [rope, *(v for v in rope.values() if isinstance(v, dict))]
    for table in tables:
        if table.get("rope_type") in ("dynamic", "longrope"):
            limit = min(limit, int(table.get("original_max_position_embeddings") or limit))
    return limit


def fingerprint(model: Any) -> bytes:
    """Digest that starts every prefix chain, so that two models never share a block."""
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(f"compressor-prefix-1|{model.dtype}|{config}".encode()).digest()


def free_memory_share(device: torch.device) -> int:
    """Bytes the pool may take: a quarter of the free memory (at most 4 GiB) on a CPU, 80 % of it
    on a GPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.8)
    return min(int(psutil.virtual_memory().available * 0.25), 4 * 2**30)
