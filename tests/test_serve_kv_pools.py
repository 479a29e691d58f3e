"""Engines whose keys and values are kept in 8 or 4 bits: what they answer and what they take."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from compressor.errors import UnsupportedError, UsageError
from compressor.serve import attention
from compressor.serve.engine import LLMEngine
from compressor.serve.kv_format import notes, resolve
from compressor.serve.offline import LLM
from compressor.serve.options import ServeOptions
from compressor.serve.sequence import SamplingParams
from compressor_kernels.reference import float_levels

TOPS = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}
PROMPTS = [list(range(3, 3 + n)) for n in (5, 19, 33, 8)]
PARAMS = SamplingParams(temperature=0, max_tokens=12)


def build(head_dim=64):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=head_dim,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def rounded(x, name):
    """x [..., E] under one scale a token and head, by the definition of the format."""
    if name not in TOPS:
        return x.to({"bf16": torch.bfloat16, "auto": x.dtype}[name]).to(x.dtype)
    scale = x.abs().amax(-1, keepdim=True) / TOPS[name]
    if name != "fp8":
        return (x / scale).round() * scale
    levels = float_levels(8)
    levels = levels[~levels.isnan()]
    return levels[((x / scale)[..., None] - levels).abs().argmin(-1)] * scale


class RoundingCache(DynamicCache):
    """transformers' own cache, whose new keys and values are rounded."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def update(self, keys, values, *args, **kwargs):
        return super().update(rounded(keys, self.name), rounded(values, self.name), *args, **kwargs)


def generate(model, prompt, name):
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=PARAMS.max_tokens,
        do_sample=False, past_key_values=RoundingCache(name),
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def serve(model, name, prompts=PROMPTS, **options):
    """Answers, and the engine that gave them."""
    given = {"num_blocks": 64, "block_size": 4} | options
    with LLM(LLMEngine(model, None, ServeOptions(kv_cache_dtype=name, **given))) as llm:
        return [a.token_ids for a in llm.generate(prompts, PARAMS)], llm.engine


@pytest.mark.parametrize("name", [*TOPS, "bf16", "auto"])
def test_greedy_tokens_equal_those_of_a_cache_that_rounds(name):
    model = build()
    expected = [generate(model, p, name) for p in PROMPTS]
    assert serve(model, name)[0] == expected


@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_preempted_and_chunked_requests_answer_the_same(name):
    model = build()
    tight = {"num_blocks": 14, "max_num_batched_tokens": 9, "max_num_seqs": 4}
    found, engine = serve(model, name, **tight)
    assert found == serve(model, name)[0]
    assert engine.scheduler.stats.num_preemptions > 0


@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_reused_prefixes_answer_the_same(name):
    model, prompt = build(), PROMPTS[2]
    engine = LLMEngine(model, None, ServeOptions(num_blocks=64, block_size=4, kv_cache_dtype=name))
    with LLM(engine) as llm:
        first, second = (llm.generate([prompt], PARAMS)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 32)
    assert first.token_ids == second.token_ids


def test_rounding_changes_the_answers_of_this_model():
    answers = [serve(build(), name)[0] for name in ("auto", "int4")]
    assert answers[0] != answers[1]


@pytest.mark.parametrize(
    ("name", "size"), [("fp32", 256), ("bf16", 128), ("fp8", 68), ("int4", 36)]
)
def test_the_pool_takes_the_bytes_of_its_codes_and_scales(name, size):
    given = {"num_blocks": None, "kv_cache_bytes": 1 << 16}
    _, engine = serve(build(), name, PROMPTS[:1], **given)
    a_block = 2 * 2 * 4 * size  # keys and values, layers, tokens
    assert engine.pool.num_blocks == (1 << 16) // a_block
    beside = a_block + a_block // 4  # the trash block and the slot that stays zero
    assert engine.runner.cache.nbytes == engine.pool.num_blocks * a_block + beside
    assert f"{engine.pool.num_blocks} blocks" in engine.notes[0]


def test_auto_follows_the_scheme_of_the_artifact():
    def asked(scheme, name="auto"):
        config = {"quantization_config": {"kv_cache_scheme": scheme}}
        return resolve(ServeOptions(kv_cache_dtype=name), config).kv_cache_dtype

    assert asked({"num_bits": 8, "type": "float"}) == "fp8"
    assert asked({"num_bits": 4, "type": "int"}) == "int4"
    assert asked(None) == "auto"
    assert asked({"num_bits": 8, "type": "float"}, "bf16") == "bf16"
    assert resolve(ServeOptions(), {}).kv_cache_dtype == "auto"
    with pytest.raises(UnsupportedError, match="4 bits of type float"):
        asked({"num_bits": 4, "type": "float"})


def test_calibrated_scales_that_are_not_used_are_told():
    stored = ["model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale"]
    assert notes(ServeOptions(kv_cache_dtype="fp8"), ["lm_head.weight"]) == []
    assert "a scale of its own" in notes(ServeOptions(kv_cache_dtype="fp8"), stored)[0]
    assert "not rounded" in notes(ServeOptions(kv_cache_dtype="bf16"), stored)[0]


def test_heads_that_do_not_fill_words_are_refused_at_start():
    with pytest.raises(UnsupportedError, match="layer 0: keys and values cannot be") as caught:
        serve(build(head_dim=32), "int4")
    assert "multiples of 64" in caught.value.why
    assert serve(build(head_dim=32), "int8")[0]


def test_unknown_names_are_refused_and_long_ones_known():
    with pytest.raises(UsageError, match="kv_cache_dtype 'fp8_e5m2' is none of auto, fp32"):
        ServeOptions(kv_cache_dtype="fp8_e5m2")
    assert serve(build(), "fp8_e4m3", PROMPTS[:1])[1].runner.kept.kind == "e4m3"


def test_a_pool_that_reads_wrongly_is_found_before_serving(monkeypatch):
    load = attention.load
    monkeypatch.setattr(attention, "load", lambda *given: load(*given) * 1.1)
    with pytest.raises(UnsupportedError, match="other logits"):
        serve(build(), "int8")
