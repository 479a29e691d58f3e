"""Divergence against an oracle of a few plain lines, with tiny random Llama models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compressor.errors import DataError, NumericError, UnsupportedError
from compressor_eval.bos import probe_bos
from compressor_eval.divergence import compare, decode_worst, kl_histogram, perplexity


def tiny(seed: int, vocab: int = 50) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return tiny(0)


@pytest.fixture(scope="module")
def other(base) -> LlamaForCausalLM:
    model = tiny(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(3, 50, (11, 24), generator=torch.Generator().manual_seed(2))


def oracle(base, model, rows) -> list[dict[str, float]]:
    """One prediction at a time, each from a run over its own prefix."""
    out = []
    for row in rows:
        for t in range(1, len(row)):
            if row[t] < 0:
                continue
            prefix = torch.tensor([row[:t]])
            with torch.no_grad():
                p = torch.softmax(base(input_ids=prefix).logits[0, -1].double(), -1)
                q = torch.softmax(model(input_ids=prefix).logits[0, -1].double(), -1)
            kl = sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))
            target = row[t]
            out.append({
                "kl": kl, "base_loss": -math.log(p[target]), "loss": -math.log(q[target]),
                "same": float(p.argmax() == q.argmax()), "dp": float(q[target] - p[target]),
            })  # fmt: skip
    return out


def test_compare_agrees_with_the_slow_oracle(base, other, tokens) -> None:
    rows = tokens[:4, :9]
    slow = oracle(base, other, rows.tolist())
    column = {k: np.array([s[k] for s in slow]) for k in slow[0]}
    result = compare(base, other, rows, batch_size=3)
    assert result.num_tokens == len(slow) == 32
    assert result.kl_mean == pytest.approx(column["kl"].mean(), rel=1e-4)
    assert result.kl_p99 == pytest.approx(np.quantile(column["kl"], 0.99), rel=1e-4)
    assert result.kl_max == pytest.approx(column["kl"].max(), rel=1e-4)
    assert result.perplexity == pytest.approx(np.exp(column["loss"].mean()), rel=1e-5)
    assert result.base_perplexity == pytest.approx(np.exp(column["base_loss"].mean()), rel=1e-5)
    assert result.top1_agreement == column["same"].mean()
    assert result.delta_p_rms == pytest.approx(np.sqrt((column["dp"] ** 2).mean()), rel=1e-4)


def test_batch_size_and_chunking_change_nothing(base, other, tokens, monkeypatch) -> None:
    one = compare(base, other, tokens, batch_size=1)
    monkeypatch.setattr("compressor_eval.divergence._CHUNK_ELEMENTS", 7 * 50)
    many = compare(base, other, tokens, batch_size=8)
    assert many.kl_mean == pytest.approx(one.kl_mean, rel=1e-5)
    assert many.top1_agreement == one.top1_agreement
    assert many.num_tokens == one.num_tokens == 11 * 23


def test_comparing_twice_gives_the_same_numbers(base, other, tokens) -> None:
    assert compare(base, other, tokens).as_json() == compare(base, other, tokens).as_json()


def test_a_model_compared_with_itself_has_no_divergence(base, tokens) -> None:
    result = compare(base, base, tokens)
    assert result.kl_max == 0.0
    assert result.perplexity_ratio == 1.0
    assert result.perplexity_ratio_ci == (1.0, 1.0)
    assert result.top1_agreement == 1.0
    assert result.top1_lost == result.top1_won == 0


def test_padding_is_not_scored(base, other, tokens) -> None:
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 10:] = False
    padded = compare(base, other, tokens, mask=mask)
    cut = compare(base, other, tokens[:, :10])
    assert padded.num_tokens == cut.num_tokens
    assert padded.kl_mean == pytest.approx(cut.kl_mean, rel=1e-5)


def test_perplexity_equals_the_one_of_compare(base, other, tokens) -> None:
    result = compare(base, other, tokens)
    assert perplexity(base, tokens) == pytest.approx(result.base_perplexity, rel=1e-9)
    assert perplexity(other, tokens, batch_size=2) == pytest.approx(result.perplexity, rel=1e-6)


def test_intervals_hold_their_point_estimates(base, other, tokens) -> None:
    r = compare(base, other, tokens)
    for name in ("perplexity_ratio", "kl_mean", "kl_p99", "top1_agreement", "delta_p_rms"):
        low, high = getattr(r, f"{name}_ci")
        assert low <= getattr(r, name) <= high, name


def test_the_histogram_loses_no_token(base, other, tokens) -> None:
    r = compare(base, other, tokens)
    assert sum(r.kl_histogram.counts) == r.num_tokens
    assert sum(kl_histogram(np.array([0.0, 1e-9, 1.0, 100.0, 1e6])).counts) == 5


def test_worst_contexts_are_sorted_and_decoded(base, other, tokens) -> None:
    class Letters:
        def decode(self, ids: list[int]) -> str:
            return " ".join(str(i) for i in ids)

    r = compare(base, other, tokens)
    texts = decode_worst(r, Letters())
    assert len(texts) == 10
    assert texts[0]["kl"] == r.kl_max
    assert [t["kl"] for t in texts] == sorted((t["kl"] for t in texts), reverse=True)
    first = r.worst[0]
    expected = tokens[first.row, : first.position].tolist()
    assert texts[0]["context"] == Letters().decode(expected)


def test_an_impossible_token_of_the_original_costs_nothing(base, tokens) -> None:
    class Forbids(torch.nn.Module):
        def forward(self, input_ids):
            out = base(input_ids=input_ids)
            out.logits[..., 0] = -math.inf
            return out

    assert compare(Forbids(), base, tokens).kl_mean > 0
    assert math.isinf(compare(base, Forbids(), tokens).kl_mean)


def test_the_models_keep_their_training_mode(base, tokens) -> None:
    base.train()
    perplexity(base, tokens)
    assert base.training
    base.eval()


def test_different_vocabularies_are_refused(base, tokens) -> None:
    with pytest.raises(UnsupportedError, match="50 and 60"):
        compare(base, tiny(0, vocab=60), tokens)


def test_nan_logits_are_refused(base, tokens) -> None:
    broken = tiny(0)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = math.nan
    with pytest.raises(NumericError, match="NaN"):
        compare(base, broken, tokens)


def test_rows_without_a_prediction_are_refused(base) -> None:
    with pytest.raises(DataError, match="no token"):
        compare(base, base, torch.ones(3, 1, dtype=torch.int64))


def test_the_bos_probe_scores_the_same_tokens_twice(base, tokens) -> None:
    rows = torch.cat([torch.ones(11, 1, dtype=torch.int64), tokens], dim=1)
    probe = probe_bos(base, rows, 1)
    assert probe.rows_with_bos == 1.0
    assert probe.without_bos == pytest.approx(perplexity(base, tokens), rel=1e-6)
    assert probe.with_bos != probe.without_bos


def test_the_bos_probe_warns_when_rows_lack_bos(base, tokens) -> None:
    assert any("do not start with BOS" in w for w in probe_bos(base, tokens, 1).warnings)
    assert "no BOS token" in probe_bos(base, tokens, None).warnings[0]
    assert probe_bos(base, tokens, None).as_json()["with_bos"] is None
