"""A model object behind lm-eval's interface, so that its tasks score ours and others' alike.

Both models of a comparison go through the same tokenization: a BOS token in front if the
tokenizer has one, whatever the tokenizer would do by itself. Import only where lm-eval is there.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor, nn

from compressor.errors import UnsupportedError

_MAX_NEW_TOKENS = 256
Request = tuple[Any, list[int], list[int]]  # (text pair, context ids, continuation ids)


class CompressorLM(TemplateLM):  # type: ignore[misc]
    """lm-eval's view of a causal model called as model(input_ids=...).logits."""

    def __init__(self, model: nn.Module, tokenizer: Any, *, batch_size: int = 8) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        weights = next(model.parameters(), None)
        self._device = torch.device("cpu") if weights is None else weights.device
        config = getattr(model, "config", None)
        self.max_length = int(getattr(config, "max_position_embeddings", 2048))

    @property
    def eot_token_id(self) -> int:
        token = self.tokenizer.eos_token_id
        return int(self.prefix_token_id if token is None else token)

    @property
    def prefix_token_id(self) -> int:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise UnsupportedError(
            "the tokenizer has neither a BOS nor an EOS token",
            why="tasks with an empty context have nothing to condition on",
            fix="set bos_token in tokenizer_config.json",
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        ids = list(self.tokenizer(string, add_special_tokens=False).input_ids)
        bos = self.tokenizer.bos_token_id
        if add_special_tokens is False or bos is None or ids[:1] == [bos]:
            return ids
        return [bos, *ids]

    def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """lm-eval's own, without its progress bar."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        """ln p(continuation | context) and whether greedy decoding would write it."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1] + requests[i][2]))
        answers: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            scored = self._score([requests[i][1:] for i in batch])
            answers.update(zip(batch, scored, strict=True))
        return [answers[i] for i in range(len(requests))]

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Score one batch; rows are padded at the end, which a causal model never looks at."""
        inputs = [(c + d)[-(self.max_length + 1) :][:-1] for c, d in pairs]
        width = max(map(len, inputs))
        rows = torch.tensor([row + [0] * (width - len(row)) for row in inputs])
        with torch.inference_mode():
            logits = self.model(input_ids=rows.to(self._device)).logits
        scored = []
        for i, (_, continuation) in enumerate(pairs):
            end = len(inputs[i])
            own = continuation[-end:]
            scored.append(_continuation_score(logits[i, end - len(own) : end], own))
        return scored

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
        """ln p(text) with as much context as fits; every token is predicted once."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs: list[Request] = [(None, *make_disjoint_window(w)) for w in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        """Greedy continuations, each cut before the first of its stop strings."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        if options.get("do_sample"):
            raise UnsupportedError(
                "a task asks for sampling",
                why="evaluation here is greedy, so that it repeats",
                fix="set do_sample: false in the task's generation_kwargs",
            )
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        limit = int(options.get("max_gen_toks", _MAX_NEW_TOKENS))
        prompt = self.tok_encode(context)[-max(1, self.max_length - limit) :]
        text = self._greedy(prompt, min(limit, self.max_length - len(prompt)), stops)
        return min((text.split(s)[0] for s in stops if s), key=len, default=text)

    def _greedy(self, prompt: list[int], limit: int, stops: list[str]) -> str:
        new: list[int] = []
        step, cache = torch.tensor([prompt], device=self._device), None
        while len(new) < limit:
            with torch.inference_mode():
                out = self.model(input_ids=step, past_key_values=cache, use_cache=True)
            token = int(out.logits[0, -1].argmax())
            if token == self.tokenizer.eos_token_id:
                break
            new.append(token)
            if any(s in self.tokenizer.decode(new) for s in stops if s):
                break
            step, cache = step.new_tensor([[token]]), out.past_key_values
        return str(self.tokenizer.decode(new))


def _continuation_score(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Sum of log-probabilities of the tokens, and whether each was the first choice."""
    target = torch.tensor(continuation, dtype=torch.int64, device=logits.device)
    chosen = torch.log_softmax(logits.double(), -1).gather(1, target[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == target).all())
