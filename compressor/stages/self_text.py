"""Text that the model writes itself, when no text of its kind is at hand (`source: self`).

A batch of prefixes (BOS alone, BOS and a random token, or the first tokens of some texts) is
continued by sampling until each text ends with EOS or is as long as a row:

    p = softmax(logits / temperature),  the smallest set of mass >= top_p,  one draw u in [0, 1)

as in LLM-QAT (Liu et al. 2023, arXiv 2305.17888). u comes from the seed, the text's number and the
position alone, so the same texts come whatever the batches were. Each finished batch is a unit of
the stage: a killed run goes on from there.

Costs: the whole model in memory, and one forward pass for every token of a batch: as much
arithmetic as calibrating on them, but token by token, which is slower per token by far.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from compressor.data.sources import Tally, load_documents
from compressor.errors import CheckpointError, DataError
from compressor.modeling.endings import end_of_text_ids
from compressor.modeling.load import load_model
from compressor.recipe import DataConfig
from compressor.recipe.data import Sampling
from compressor.stages.context import StageContext

MAX_TRIES = 8  # texts written for each row asked for, before giving up


def written_by_the_model(config: DataConfig, *, context: StageContext) -> Iterator[list[int]]:
    """Documents [BOS, ...] sampled from the model the recipe starts from, batch by batch.

    Raises:
        DataError: prefixes cannot be read (CA01-CA08).
        CheckpointError: the tokenizer has no token a text may begin with (CK37).
    """
    writer: _Writer | None = None
    size = config.sampling.batch_size
    limit = MAX_TRIES * -(-config.num_samples // size)
    for batch in range(limit):
        unit = f"self-{batch:05d}"
        if not context.run.is_done(unit):
            writer = writer or _Writer(config, context.source, context.seed)
            tokens, lengths = writer.write(range(batch * size, (batch + 1) * size))
            context.run.commit(unit, {"tokens": tokens, "lengths": lengths}, {})
            context.run.progress({"unit": unit, "index": batch + 1, "total": limit})
        stored = load_file(context.run.file(unit))
        for ids, length in zip(stored["tokens"], stored["lengths"].tolist(), strict=True):
            yield ids[:length].tolist()


class _Writer:
    """The model, and the prefixes its texts begin with."""

    def __init__(self, config: DataConfig, folder: Path, seed: int) -> None:
        loaded = load_model(folder, packed=False)
        self.model, self.config = loaded.model, config
        self.seed = seed if config.seed is None else config.seed
        tokenizer = loaded.tokenizer
        self.begin = _first_token(tokenizer)
        self.eos = torch.tensor(sorted(end_of_text_ids(loaded.model, tokenizer)), dtype=torch.int64)
        known = min(len(tokenizer), loaded.model.config.get_text_config().vocab_size)
        self.ordinary = sorted(set(range(known)) - set(tokenizer.all_special_ids))
        self.prefixes = _prefixes(config, tokenizer, self.begin)

    @torch.inference_mode()
    def write(self, numbers: range) -> tuple[Tensor, Tensor]:
        """Texts with these numbers: token ids [B, T] (zeros behind the end) and lengths [B]."""
        begin, length = [self._prefix(n) for n in numbers], self.config.seq_len
        done = torch.zeros(len(begin), dtype=torch.bool)
        tokens = torch.zeros(len(begin), length, dtype=torch.int64)
        lengths = torch.full((len(begin),), length)
        cache, logits = None, torch.empty(0)
        for place in range(length):
            given = torch.tensor([b[place] if place < len(b) else -1 for b in begin])
            drawn, free = given, given < 0
            if bool(free.any()):
                u = torch.tensor([uniform(self.seed, n, place) for n in numbers])
                drawn = torch.where(free, draw(logits, u, self.config.sampling), given)
            tokens[:, place] = drawn.masked_fill(done, 0)
            ended = free & ~done & torch.isin(drawn, self.eos)
            lengths[ended] = place + 1
            done |= ended
            if bool(done.all()) or place + 1 == length:
                break
            out = self.model(tokens[:, place, None], past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[:, -1].float()
        return tokens, lengths

    def _prefix(self, number: int) -> list[int]:
        if self.config.sampling.prefixes == "random":
            return [
                self.begin,
                self.ordinary[int(uniform(self.seed, number, 0) * len(self.ordinary))],
            ]
        if not self.prefixes:
            return [self.begin]
        return self.prefixes[number % len(self.prefixes)]


def _first_token(tokenizer: Any) -> int:
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise CheckpointError(
            "the tokenizer has neither BOS nor EOS: there is nothing a text could begin with",
            code="CK37",
            fix="give a text instead of `self`",
        )
    return int(found)


def _prefixes(config: DataConfig, tokenizer: Any, begin: int) -> list[list[int]]:
    """First tokens of the texts of `sampling.prefixes`; empty if the recipe names none."""
    source = config.sampling.prefixes
    if source in (None, "random"):
        return []
    data = config.model_copy(update={"source": source, "sources": [], "seed": None})
    length = min(config.sampling.prefix_tokens, config.seq_len - 1)
    found = []
    for document in load_documents(data, Tally()):
        ids = tokenizer.encode(document.text, add_special_tokens=False)[:length]
        found.append(ids if ids[:1] == [begin] else [begin, *ids][: length + 1])
        if len(found) == MAX_TRIES * config.num_samples:
            break
    if not found:
        raise DataError(
            "the texts that prefixes are taken from are empty",
            code="CA02",
            where=config.where("sampling.prefixes"),
            fix="name another source, or leave prefixes out",
        )
    return found


def uniform(seed: int, number: int, position: int) -> float:
    """A number in [0, 1) from a seed, a text's number and a position (SHA-256)."""
    digest = hashlib.sha256(f"{seed}/{number}/{position}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2.0**56


def draw(logits: Tensor, u: Tensor, sampling: Sampling) -> Tensor:
    """One token for each row of logits [B, V]: the one at quantile u [B] of what top_p leaves."""
    p = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    p, order = p.sort(dim=-1, descending=True, stable=True)
    before = p.cumsum(-1) - p
    p = p.masked_fill(before >= sampling.top_p, 0.0)
    total = p.cumsum(-1)
    place = torch.searchsorted(total, (u.double() * total[:, -1])[:, None], right=True)
    return order.gather(1, place.clamp(max=p.shape[-1] - 1))[:, 0]
