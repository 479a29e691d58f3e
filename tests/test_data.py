"""Sources become full token rows, the same each time; every bad row is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from compressor.data import contamination, load_texts, one_document_a_row, token_rows
from compressor.errors import CheckpointError, DataError
from compressor.recipe import DataConfig
from tests.faults.ca import LONG, ROWS, TEMPLATES, chat, good, lines
from tests.faults.row import Row, folder_digest
from tests.fixtures_models import VOCAB

BOS = 1


@pytest.fixture(scope="module")
def tokenizer(tiny_models: Callable[[str], Path]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_models("llama"))


def config(source: object, **changes: Any) -> DataConfig:
    return DataConfig(source=str(source), **{"num_samples": 8, "seq_len": 16, **changes})


def rows(source: object, tokenizer: Any, **changes: Any):
    return token_rows(config(source, **changes), tokenizer, vocab_size=VOCAB, max_positions=256)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bad_data_is_refused_with_its_fault_and_left_alone(row: Row, tmp_path, tokenizer):
    source = row.build(tmp_path)
    before = folder_digest(tmp_path)
    with pytest.raises(row.error) as caught:
        rows(source, tokenizer)
    message = str(caught.value)
    assert caught.value.code == row.code
    assert all(piece in message for piece in row.tells), message
    assert caught.value.fix
    assert folder_digest(tmp_path) == before


@pytest.mark.parametrize("row", TEMPLATES, ids=lambda row: row.name)
def test_a_bad_chat_template_is_named(row: Row, tmp_path, tiny_models):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models("llama"))
    tokenizer.chat_template = row.build(tmp_path)
    with pytest.raises(row.error) as caught:
        rows(lines(chat(LONG))(tmp_path), tokenizer)
    assert caught.value.code == row.code
    assert all(piece in str(caught.value) for piece in row.tells), str(caught.value)


def test_rows_start_with_one_bos_and_hold_the_beginning_of_each_text(tmp_path, tokenizer):
    found = rows(lines(*good())(tmp_path), tokenizer)
    texts = [json.loads(line)["text"] for line in good()]
    wanted = [[BOS, *tokenizer.encode(t, add_special_tokens=False)][:16] for t in texts]
    assert found.tokens.tolist() == wanted
    assert found.tokens.dtype == torch.int64
    assert found.mask.all()
    assert found.mask.shape == found.tokens.shape
    assert found.notes == ()


TEXTS = [f"text number {i}" for i in range(60)]


def documents(tokenizer: Any) -> list[list[int]]:
    return [[BOS, *tokenizer.encode(t, add_special_tokens=False)] for t in TEXTS]


def test_joined_rows_are_the_documents_end_to_end_cut_in_pieces(tmp_path, tokenizer):
    source = lines(*(json.dumps({"text": t}) for t in TEXTS))(tmp_path)
    found = rows(source, tokenizer, packing="joined")
    assert found.tokens.flatten().tolist() == [*chain(*documents(tokenizer))][: 8 * 16]
    assert found.positions is None


def test_packed_rows_know_where_their_documents_begin(tmp_path, tokenizer):
    source = lines(*(json.dumps({"text": t}) for t in TEXTS))(tmp_path)
    found = rows(source, tokenizer, packing="packed")
    assert (found.tokens.shape, found.positions.shape) == ((8, 16), (8, 16))
    assert (found.tokens[found.positions == 0] == BOS).all()
    apart = one_document_a_row(found)
    pieces = [t[m].tolist() for t, m in zip(apart.tokens, apart.mask, strict=True)]
    whole = documents(tokenizer)
    assert pieces[0] == whole[0]
    assert all(any(p[1:] == d[i : i + len(p) - 1] for d in whole for i in range(len(d)))
               for p in pieces)  # fmt: skip
    assert sum(m.sum() for m in apart.mask) >= 8 * 16 - 8


def test_a_long_document_goes_on_after_bos_in_the_next_packed_row(tmp_path, tokenizer):
    found = rows(lines(*good(4))(tmp_path), tokenizer, packing="packed", num_samples=2)
    ids = tokenizer.encode(json.loads(good()[0])["text"], add_special_tokens=False)
    assert found.tokens[0].tolist() == [BOS, *ids[:15]]
    assert found.tokens[1].tolist()[:10] == [BOS, *ids[15:24]]


def test_the_same_rows_come_from_every_file_format(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    table = [json.loads(line) for line in good()]
    (tmp_path / "list.json").write_text(json.dumps(table))
    (tmp_path / "dict.json").write_text(json.dumps({"data": table}))
    (tmp_path / "text.txt").write_text("\n\n".join(r["text"] for r in table))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "t.parquet")
    lines(*good())(tmp_path)
    lines(*good(), name="lines.json")(tmp_path)
    digests = {rows(file, tokenizer).digest for file in tmp_path.iterdir()}
    assert len(digests) == 1


def test_a_seed_shuffles_the_same_way_each_time(tmp_path, tokenizer):
    source = lines(*good(40))(tmp_path)
    plain, first, again, other = (rows(source, tokenizer, seed=s) for s in (None, 3, 3, 4))
    assert first.digest == again.digest
    assert len({plain.digest, first.digest, other.digest}) == 3
    assert sorted(load_texts(config(source, seed=3))) == sorted(load_texts(config(source)))


def test_only_as_much_is_read_as_is_needed(tmp_path, tokenizer):
    source = lines(*good(8), "broken beyond what is read")(tmp_path)
    assert rows(source, tokenizer).num_documents == 8


def test_fewer_rows_than_asked_are_noted_with_their_reasons(tmp_path, tokenizer):
    source = lines(*good(5), '{"text": "short"}')(tmp_path)
    found = rows(source, tokenizer)
    assert found.tokens.shape == (5, 16)
    assert "5 of 8 rows" in found.notes[0]
    assert "1 shorter than 16" in found.notes[0]


def test_bad_rows_are_skipped_by_request_and_counted(tmp_path, tokenizer):
    source = lines(*good(4), "oops", b'{"text": "\xff"}', *good(8)[4:])(tmp_path)
    found = rows(source, tokenizer, skip_bad_rows=2)
    assert len(found.tokens) == 8
    assert "2 bad rows skipped" in found.notes[0]
    with pytest.raises(DataError, match="1 bad rows were skipped before") as caught:
        rows(source, tokenizer, skip_bad_rows=1)
    assert caught.value.code == "CA07"


def test_conversations_go_through_the_chat_template_with_one_bos(tmp_path, tokenizer):
    source = lines(*(chat(f"{i} {LONG}", "and more") for i in range(8)))(tmp_path)
    row = rows(source, tokenizer).tokens[0]
    assert row[0] == BOS
    assert row[1] != BOS
    assert tokenizer.decode(row[1:]).startswith("[user] 0 for index")


def test_ids_beyond_the_vocabulary_are_refused(tmp_path, tokenizer):
    source = lines(*good())(tmp_path)
    with pytest.raises(DataError, match=r"outside of the vocabulary of 200") as caught:
        token_rows(config(source), tokenizer, vocab_size=200, max_positions=None)
    assert caught.value.code == "CA08"
    assert caught.value.where.line == 1


def test_rows_longer_than_the_positions_are_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match="256 positions") as caught:
        rows(lines(*good())(tmp_path), tokenizer, seq_len=300)
    assert caught.value.code == "CA10"


def test_the_same_row_again_and_again_is_noted(tmp_path, tokenizer):
    found = rows(lines(*good(1) * 8)(tmp_path), tokenizer)
    assert "only 1 of 8 rows differ" in found.notes[0]


def test_a_tokenizer_that_knows_little_of_the_text_is_refused(tmp_path):
    found = lines(json.dumps({"text": "known strange " * 20}))(tmp_path)
    with pytest.raises(DataError, match=r"5\d\.\d% of the tokens are unknown") as caught:
        rows(found, word_tokenizer(), num_samples=1)
    assert caught.value.code == "CA12"


def word_tokenizer() -> Any:
    """A tokenizer that knows one word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "known": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def test_named_datasets_are_streamed_row_by_row(monkeypatch, tmp_path, tokenizer):
    import datasets

    seen: dict[str, Any] = {}

    def load_dataset(*name: Any, **arguments: Any) -> Any:
        seen.update(arguments, name=name)
        return datasets.Dataset.from_list([json.loads(r) for r in good()]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    found = rows("org/set:subset", tokenizer, split="test")
    assert found.digest == rows(lines(*good())(tmp_path), tokenizer).digest
    assert seen == {"name": ("org/set", "subset"), "split": "test", "streaming": True}


def test_an_unknown_dataset_is_not_a_network_failure(monkeypatch, tokenizer):
    import datasets

    def load_dataset(*_: Any, **__: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("no such set")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(DataError, match="no such set") as caught:
        rows("org/set", tokenizer)
    assert caught.value.code == "CA01"


def test_conversations_need_a_chat_template(tmp_path, tiny_models):
    bare = AutoTokenizer.from_pretrained(tiny_models("llama"))
    bare.chat_template = None
    with pytest.raises(CheckpointError, match="no chat template") as caught:
        rows(lines(chat(LONG))(tmp_path), bare, skip_bad_rows=5)
    assert caught.value.code == "CK37"
    assert caught.value.where.line == 1


def test_a_template_alone_says_what_a_conversation_begins_with(tmp_path, tiny_models):
    plain = AutoTokenizer.from_pretrained(tiny_models("llama"))
    plain.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    found = rows(lines(chat(LONG * 3))(tmp_path), plain, num_samples=1)
    assert found.tokens[0].tolist() == plain.encode(LONG * 3, add_special_tokens=False)[:16]


def test_what_a_source_gave_is_told(tmp_path, tokenizer):
    (facts,) = rows(lines(*good())(tmp_path), tokenizer).sources
    assert facts.source.endswith("data.jsonl")
    assert (facts.num_rows, facts.num_documents, facts.unknown_share) == (8, 8, 0.0)


@pytest.mark.parametrize("name", ["data.jsonl", "reference-like.jsonl"])
def test_a_split_of_a_local_file_is_not_ignored_silently(name, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = lines(*good())(tmp_path).rename(name)
    plain = list(load_texts(DataConfig(source=str(file))))
    assert not caplog.records
    assert list(load_texts(DataConfig(source=str(file), split="evaluation"))) == plain
    assert "`split: evaluation` chooses nothing" in caplog.text


def test_the_two_reference_texts_do_not_overlap():
    first = list(load_texts(DataConfig()))
    second = list(load_texts(DataConfig(source="reference-eval")))
    assert list(load_texts(DataConfig(split="evaluation"))) == second
    assert first
    assert second
    assert contamination(first, second).identical_rows == 0
