"""From documents to a matrix of tokens [N, T], each row full, so that no padding is ever needed.

    rows     one document a row:  BOS d d d d d d d      cut at T; shorter documents are passed over
    packed   documents in a row:  BOS a a a BOS b b b    which do not see each other; one that does
    positions                       0 1 2 3   0 1 2 3    not fit goes on in the next row after BOS
    joined   documents in a row:  BOS a a a BOS b b b    where b sees a (as perplexity on WikiText
                                                         is usually measured)

N = number of rows, T = seq_len. `rows` is what the model sees in use (a text from its beginning);
`packed` uses short documents too. A conversation is what the tokenizer's chat template makes of it,
applied once; plain text gets one BOS (or one EOS at its end if the tokenizer has no BOS). The same
source, tokenizer and settings give the same digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from compressor.data.sources import Document, Tally, load_documents
from compressor.errors import CheckpointError, DataError, Where, printable
from compressor.recipe import DataConfig
from compressor.recipe.data import SELF

MAX_UNKNOWN = 0.05  # share of unknown tokens above which the tokenizer is not this text's
MAX_DUPLICATE = 0.9


Cut = tuple[list[int], list[int]]  # tokens of a row, and the place of each in its document
Generate = Callable[[DataConfig], Iterable[list[int]]]


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """What one source gave: rows, documents read, and the share of unknown tokens."""

    source: str
    num_rows: int
    num_documents: int
    unknown_share: float


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Token ids ready for a model.

    Attributes:
        tokens: int64 [N, T].
        mask: bool [N, T], True where a token counts; all True unless rows were padded.
        digest: SHA-256 of the matrix, its shape included.
        notes: what a person should know (fewer rows than asked, duplicates, cut documents).
        num_documents: documents read to fill the rows.
        positions: int64 [N, T], the place of each token in its document, if rows hold several
            documents that do not see each other; None if a row is one sequence.
        sources: where the rows come from.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    digest: str
    notes: tuple[str, ...] = ()
    num_documents: int = 0
    positions: torch.Tensor | None = None
    sources: tuple[SourceFacts, ...] = ()

    def first(self, count: int) -> TokenRows:
        """The first rows; digest and notes stay those of the whole."""
        positions = None if self.positions is None else self.positions[:count]
        return replace(
            self, tokens=self.tokens[:count], mask=self.mask[:count], positions=positions
        )


def token_rows(
    config: DataConfig,
    tokenizer: Any,
    *,
    vocab_size: int,
    max_positions: int | None = None,
    generate: Generate | None = None,
) -> TokenRows:
    """Read, tokenize and cut `config.num_samples` rows of `config.seq_len` tokens.

    Args:
        config: source, row count and length, packing.
        tokenizer: a transformers tokenizer.
        vocab_size: rows of the model's embedding; every id must be below.
        max_positions: the longest row the model can take, if it has a limit.
        generate: gives documents as token ids for `source: self`.

    Raises:
        DataError: CA01-CA13 except those that are notes.
        HubError: CA16.
    """
    from compressor.data.mixture import mixture

    _check_length(config, max_positions)
    if config.sources:
        return mixture(
            config, lambda part: _rows_of_one(part, tokenizer, vocab_size, generate), token_digest
        )
    return _rows_of_one(config, tokenizer, vocab_size, generate)


def _rows_of_one(
    config: DataConfig, tokenizer: Any, vocab_size: int, generate: Generate | None
) -> TokenRows:
    tally = Tally()
    if config.source == SELF:
        streams = _generated(config, generate, tally)
    else:
        streams = _token_lists(config, tokenizer, vocab_size, tally)
    rows = _take(_CUTS[config.packing](streams, _Row(config, tokenizer), tally), config.num_samples)
    notes = _check_count(len(rows), config, tally)
    tokens, positions = (_matrix(side, config.seq_len) for side in zip(*rows, strict=True))
    unknown = _check_unknown(tokens, tokenizer, config)
    notes += _duplicate_note(tokens) + _skip_note(tally)
    facts = SourceFacts(config.source, len(rows), tally.documents, unknown)
    return TokenRows(
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        token_digest(tokens),
        tuple(notes),
        tally.documents,
        positions if config.packing == "packed" else None,
        (facts,),
    )


def _matrix(rows: Iterable[list[int]], length: int) -> torch.Tensor:
    return torch.tensor(list(rows), dtype=torch.int64).reshape(-1, length)


def one_document_a_row(rows: TokenRows) -> TokenRows:
    """The same documents, each in a row of its own, padded at the end where the mask is False.

    Attention is causal, so what a model computes for the real tokens is the same.
    """
    if rows.positions is None:
        return rows
    flat, places = rows.tokens.flatten(), rows.positions.flatten()
    starts = (places == 0).nonzero().flatten().tolist()
    pieces = [flat[a:b] for a, b in zip(starts, [*starts[1:], len(flat)], strict=True)]
    pieces = [p for p in pieces if len(p) > 1]  # nothing is predicted from a BOS alone
    tokens = torch.zeros(len(pieces), rows.tokens.shape[1], dtype=torch.int64)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, piece in enumerate(pieces):
        tokens[row, : len(piece)], mask[row, : len(piece)] = piece, True
    return replace(rows, tokens=tokens, mask=mask, positions=None)


def token_digest(tokens: torch.Tensor) -> str:
    """SHA-256 over the shape and the ids of an int64 matrix."""
    total = hashlib.sha256(str(tuple(tokens.shape)).encode())
    total.update(tokens.contiguous().numpy().tobytes())
    return total.hexdigest()


def _generated(config: DataConfig, generate: Generate | None, tally: Tally) -> Iterator[list[int]]:
    if generate is None:
        raise DataError(
            "`self` is text that the model writes, and no model is at hand here",
            code="CA01",
            where=config.where("source"),
            fix="use it for calibrate or distill, or give a text",
        )
    for ids in generate(config):
        tally.documents += 1
        yield ids


def _take(rows: Iterator[Cut], count: int) -> list[Cut]:
    return list(islice(rows, count))


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
        yield ids if document.messages else _with_ends(ids, tokenizer)


def _with_ends(ids: list[int], tokenizer: Any) -> list[int]:
    """Plain text with one BOS, or with an EOS behind it if the tokenizer has no BOS."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None:
        return ids if ids[:1] == [bos] else [bos, *ids]
    return ids if eos is None else [*ids, eos]


def _render(document: Document, tokenizer: Any) -> str:
    """The text of a document; a conversation goes through the tokenizer's chat template."""
    import jinja2

    if not document.messages:
        return document.text
    if not getattr(tokenizer, "chat_template", None):
        raise CheckpointError(
            "the rows are conversations, and the tokenizer has no chat template",
            code="CK37",
            where=document.place,
            why="Without the model's own template its markers would be guessed.",
            fix="add chat_template.jinja to the model's folder, or give rows with plain text",
        )
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


class _Row:
    """Length of a row, and the token a document begins with in each row it reaches."""

    def __init__(self, config: DataConfig, tokenizer: Any) -> None:
        self.length: int = config.seq_len
        self.bos: int | None = tokenizer.bos_token_id


def _one_each(streams: Iterable[list[int]], row: _Row, tally: Tally) -> Iterator[Cut]:
    for ids in streams:
        if len(ids) < row.length:
            tally.leave_out(f"shorter than {row.length} tokens")
        else:
            yield ids[: row.length], list(range(row.length))


def _packed(streams: Iterable[list[int]], row: _Row, tally: Tally) -> Iterator[Cut]:
    tokens: list[int] = []
    places: list[int] = []
    for ids in streams:
        again = [row.bos] if row.bos is not None and ids[:1] == [row.bos] else []
        rest = ids
        while rest:
            piece, rest = rest[: row.length - len(tokens)], rest[row.length - len(tokens) :]
            tokens += piece
            places += range(len(piece))
            if len(tokens) == row.length:
                yield tokens, places
                tokens, places = [], []
                rest = again + rest if rest else rest
    if tokens:
        tally.leave_out(f"last {len(tokens)} tokens (no full row)")


def _joined(streams: Iterable[list[int]], row: _Row, tally: Tally) -> Iterator[Cut]:
    rest: list[int] = []
    for ids in streams:
        rest += ids
        full = len(rest) // row.length * row.length
        for start in range(0, full, row.length):
            yield rest[start : start + row.length], list(range(row.length))
        rest = rest[full:]
    if rest:
        tally.leave_out(f"last {len(rest)} tokens (no full row)")


_CUTS = {"rows": _one_each, "packed": _packed, "joined": _joined}


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


def _check_unknown(tokens: torch.Tensor, tokenizer: Any, config: DataConfig) -> float:
    """Share of unknown tokens; refused when it is too large (CA12)."""
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    if tokenizer.unk_token_id is None or tokenizer.unk_token_id in special:
        return 0.0
    share = float((tokens == tokenizer.unk_token_id).double().mean())
    if share > MAX_UNKNOWN:
        raise DataError(
            f"{share:.1%} of the tokens are unknown to the tokenizer",
            code="CA12",
            where=Where(file=printable(config.source)),
            why=f"More than {MAX_UNKNOWN:.0%}: text and tokenizer do not belong together.",
            fix="use the model's own tokenizer, or text in its language",
        )
    return share


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
