"""From documents to a matrix of tokens [N, T], each row full, so that no padding is ever needed.

    rows     one document a row:  BOS d d d d d d d      cut at T; shorter documents are passed over
    packed   documents joined:    BOS a a a BOS b b b    then cut into rows of T tokens

N = number of rows, T = seq_len. `rows` is what the model sees in use (a text from its beginning);
`packed` uses short documents too. The same source, tokenizer and settings give the same digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from compressor.data.sources import Document, Tally, load_documents
from compressor.errors import CheckpointError, DataError, Where, printable
from compressor.recipe import DataConfig

MAX_UNKNOWN = 0.05  # share of unknown tokens above which the tokenizer is not this text's
MAX_DUPLICATE = 0.9


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Token ids ready for a model.

    Attributes:
        tokens: int64 [N, T].
        mask: bool [N, T], True where a token counts; every row is full, so all True.
        digest: SHA-256 of the matrix, its shape included.
        notes: what a person should know (fewer rows than asked, duplicates, cut documents).
        num_documents: documents read to fill the rows.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    digest: str
    notes: tuple[str, ...] = ()
    num_documents: int = 0


def token_rows(
    config: DataConfig, tokenizer: Any, *, vocab_size: int, max_positions: int | None = None
) -> TokenRows:
    """Read, tokenize and cut `config.num_samples` rows of `config.seq_len` tokens.

    Args:
        config: source, row count and length, packing.
        tokenizer: a transformers tokenizer.
        vocab_size: rows of the model's embedding; every id must be below.
        max_positions: the longest row the model can take, if it has a limit.

    Raises:
        DataError: CA01-CA13 except those that are notes.
        HubError: CA16.
    """
    _check_length(config, max_positions)
    tally = Tally()
    streams = _token_lists(config, tokenizer, vocab_size, tally)
    cut = _packed if config.packing == "packed" else _one_each
    rows = _take(cut(streams, config.seq_len, tally), config.num_samples)
    notes = _check_count(len(rows), config, tally)
    tokens = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), config.seq_len)
    notes += _check_unknown(tokens, tokenizer, config) + _duplicate_note(tokens) + _skip_note(tally)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return TokenRows(tokens, mask, token_digest(tokens), tuple(notes), tally.documents)


def token_digest(tokens: torch.Tensor) -> str:
    """SHA-256 over the shape and the ids of an int64 matrix."""
    total = hashlib.sha256(str(tuple(tokens.shape)).encode())
    total.update(tokens.contiguous().numpy().tobytes())
    return total.hexdigest()


def overlap(calibration_texts: Iterable[str], evaluation_texts: Iterable[str]) -> int:
    """How many evaluation texts were calibrated on too, spaces aside (CA15)."""
    seen = {_text_hash(text) for text in calibration_texts}
    return sum(_text_hash(text) in seen for text in evaluation_texts)


def _text_hash(text: str) -> bytes:
    return hashlib.sha256(" ".join(text.split()).encode()).digest()


def _take(rows: Iterator[list[int]], count: int) -> list[list[int]]:
    taken = []
    for row in rows:
        taken.append(row)
        if len(taken) == count:
            break
    return taken


def _token_lists(
    config: DataConfig, tokenizer: Any, vocab_size: int, tally: Tally
) -> Iterator[list[int]]:
    for document in load_documents(config, tally):
        try:
            text = _render(document, tokenizer)
        except DataError as error:
            tally.bad_row(error, config.skip_bad_rows)
            continue
        ids = list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
        _check_ids(ids, vocab_size, document.place)
        if tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
            ids.insert(0, tokenizer.bos_token_id)
        elif tokenizer.bos_token_id is None and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        yield ids


def _render(document: Document, tokenizer: Any) -> str:
    """The text of a document; a conversation goes through the tokenizer's chat template."""
    import jinja2

    if not document.messages:
        return document.text
    try:
        messages = [dict(m) for m in document.messages]
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(
            f"the chat template is not valid: {error.message}",
            code="CK37",
            where=Where(file="chat_template.jinja", line=error.lineno),
            fix="mend the template, or give rows with plain text",
        ) from None
    except Exception as error:  # a template is a program of its own and may raise anything
        raise DataError(
            f"the chat template fails on this row ({printable(str(error), 160)})",
            code="CA13",
            where=document.place,
            fix="mend or remove this row",
        ) from error


def _one_each(streams: Iterable[list[int]], length: int, tally: Tally) -> Iterator[list[int]]:
    for ids in streams:
        if len(ids) < length:
            tally.leave_out(f"shorter than {length} tokens")
        else:
            yield ids[:length]


def _packed(streams: Iterable[list[int]], length: int, tally: Tally) -> Iterator[list[int]]:
    rest: list[int] = []
    for ids in streams:
        rest += ids
        full = len(rest) // length * length
        for start in range(0, full, length):
            yield rest[start : start + length]
        rest = rest[full:]
    if rest:
        tally.leave_out(f"last {len(rest)} tokens (no full row)")


def _check_length(config: DataConfig, max_positions: int | None) -> None:
    if max_positions is not None and config.seq_len > max_positions:
        raise DataError(
            f"seq_len {config.seq_len} is longer than the model's {max_positions} positions",
            code="CA10",
            where=config.where("seq_len"),
            why="The model was never trained beyond them.",
            fix=f"set seq_len to at most {max_positions}",
        )


def _check_ids(ids: list[int], vocab_size: int, place: Where) -> None:
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise DataError(
            f"token id {wrong} is outside of the vocabulary of {vocab_size}",
            code="CA08",
            where=place,
            why="The tokenizer is not the one of this model.",
            fix="use the tokenizer files that belong to the checkpoint",
        )


def _check_count(found: int, config: DataConfig, tally: Tally) -> list[str]:
    if found == config.num_samples:
        return []
    where = config.where("source")
    place = where if where.file else Where(file=printable(config.source))
    fix = "lower seq_len or num_samples, use packing: packed, or give more text"
    if found == 0:
        raise DataError(f"no row is left: {tally}", code="CA02", where=place, fix=fix)
    message = f"{found} of {config.num_samples} rows: {tally}"
    if found < config.min_fraction * config.num_samples:
        share = f"{config.min_fraction:.0%}"
        raise DataError(
            message, code="CA03", where=place, why=f"min_fraction asks for {share}.", fix=fix
        )
    return [message]


def _check_unknown(tokens: torch.Tensor, tokenizer: Any, config: DataConfig) -> list[str]:
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    if tokenizer.unk_token_id is None or tokenizer.unk_token_id in special:
        return []
    share = float((tokens == tokenizer.unk_token_id).double().mean())
    if share > MAX_UNKNOWN:
        raise DataError(
            f"{share:.1%} of the tokens are unknown to the tokenizer",
            code="CA12",
            where=Where(file=printable(config.source)),
            why=f"More than {MAX_UNKNOWN:.0%}: text and tokenizer do not belong together.",
            fix="use the model's own tokenizer, or text in its language",
        )
    return []


def _duplicate_note(tokens: torch.Tensor) -> list[str]:
    distinct = len(torch.unique(tokens, dim=0))
    if len(tokens) > 1 and (distinct == 1 or 1 - distinct / len(tokens) > MAX_DUPLICATE):
        return [f"only {distinct} of {len(tokens)} rows differ: statistics will be poor (CA09)"]
    return []


def _skip_note(tally: Tally) -> list[str]:
    if not tally.bad:
        return []
    first = tally.bad[0]
    return [f"{len(tally.bad)} bad rows skipped, the first: {first.message} ({first.where})"]
