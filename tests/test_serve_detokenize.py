"""The detokenizer: pieces join to the whole, characters stay whole, stop strings never show."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compressor.serve.detokenize import Detokenizer


def byte_tokenizer():
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZER = byte_tokenizer()


def pieces(text, stop=()):
    detokenizer = Detokenizer(TOKENIZER, (), stop)
    out = [detokenizer.add(t) for t in TOKENIZER.encode(text)]
    return [*out, detokenizer.finish()], detokenizer


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
@settings(max_examples=200, deadline=None)
def test_joined_pieces_are_the_decoded_whole(text):
    assert "".join(pieces(text)[0]) == TOKENIZER.decode(TOKENIZER.encode(text))


@given(st.lists(st.integers(0, 255), max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_bytes_give_text_without_an_exception(ids):
    detokenizer = Detokenizer(TOKENIZER, (), ("ab",))
    "".join([*(detokenizer.add(t) for t in ids), detokenizer.finish()]).encode()


def test_a_character_of_four_bytes_comes_out_once_and_whole():
    assert pieces("a🙂b")[0] == ["a", "", "", "", "🙂", "b", ""]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("hello STOP there", ("STOP",), "hello "),
        ("hello STO there", ("STOP",), "hello STO there"),
        ("aab", ("ab",), "a"),
        ("x\n\ny", ("\n\n", "y"), "x"),
        ("ends STO", ("STOP",), "ends STO"),
        ("STOP", ("STOP",), ""),
    ],
)
def test_stop_strings_across_tokens_are_cut_off(text, stop, expected):
    out, detokenizer = pieces(text, stop)
    assert "".join(out) == expected
    assert detokenizer.stopped == (text != expected)


@given(st.text("ab", max_size=20), st.text("ab", min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_stopping_equals_cutting_the_whole_text(text, stop):
    assert "".join(pieces(text, (stop,))[0]) == text.split(stop, 1)[0]
