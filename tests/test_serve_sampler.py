"""The sampler: distributions, filters, seeds, log-probabilities."""

import math

import pytest
import torch

from compressor.errors import UsageError
from compressor.serve.sampler import draw_token, edit_logits, sample, token_logprobs, uniform
from compressor.serve.sequence import SamplingParams, Sequence

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])


def histogram(params, draws=4000):
    counts = torch.zeros(5)
    for position in range(draws):
        counts[draw_token(LOGITS, params, uniform(3, position))] += 1
    return counts / draws


def test_uniform_numbers_are_spread_evenly():
    values = torch.tensor([uniform(seed, p) for seed in range(50) for p in range(100)])
    assert values.min() >= 0
    assert values.max() < 1
    counts = torch.histc(values, 10, 0, 1)
    assert ((counts - 500) ** 2 / 500).sum() < 27.9  # chi-square, 9 degrees, p = 0.001


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature):
    expected = torch.softmax(LOGITS / temperature, -1)
    found = histogram(SamplingParams(temperature=temperature))
    assert ((found - expected) ** 2 / expected).sum() * 4000 < 18.5  # 4 degrees, p = 0.001


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(top_k=2), {0, 1}),
        (SamplingParams(top_p=0.6), {0, 1}),
        (SamplingParams(top_p=1e-9), {0}),
        (SamplingParams(min_p=0.3), {0, 1}),
        (SamplingParams(top_k=3, min_p=0.3), {0, 1}),
        (SamplingParams(temperature=1e-6), {0}),
        (SamplingParams(temperature=1e-300), {0}),
    ],
)
def test_filters_keep_only_the_likely_tokens(params, kept):
    found = histogram(params, 500)
    assert set(found.nonzero().flatten().tolist()) == kept


def test_the_last_quantile_is_still_a_kept_token():
    assert draw_token(LOGITS, SamplingParams(top_k=2), 1 - 2**-53) == 1


def test_rows_of_one_batch_keep_their_own_settings():
    sequences = [
        Sequence("a", (1,), SamplingParams(temperature=0)),
        Sequence("b", (1,), SamplingParams(temperature=0, logit_bias=((3, 100.0),))),
    ]
    assert sample(torch.stack([LOGITS, LOGITS]), sequences, frozenset()) == [0, 3]


def test_penalties_follow_openai_definition():
    sequence = Sequence("a", (4,), SamplingParams(presence_penalty=0.5, frequency_penalty=0.25))
    sequence.tokens += [0, 0, 1]
    row = LOGITS.clone()
    edit_logits(row, sequence, frozenset())
    torch.testing.assert_close(LOGITS - row, torch.tensor([1.0, 0.75, 0, 0, 0]))


def test_end_of_text_waits_for_the_minimum_length():
    sequence = Sequence("a", (4,), SamplingParams(temperature=0, min_tokens=1))
    assert sample(LOGITS[None], [sequence], frozenset({0})) == [1]


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"min_p": 2}, {"top_k": -1}, {"stop": ("",)}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError):
        SamplingParams(**wrong)


def test_logprobs_are_of_the_raw_logits():
    (entry,) = token_logprobs(LOGITS[None], [2], 2)
    expected = torch.log_softmax(LOGITS, -1)
    assert math.isclose(entry.logprob, float(expected[2]), rel_tol=1e-6)
    assert [t for t, _ in entry.top] == [0, 1]
