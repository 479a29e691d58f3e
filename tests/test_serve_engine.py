"""The engine on tiny models: its greedy text is that of transformers' own generate."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from compressor.errors import UnsupportedError, UsageError
from compressor.serve.engine import LLMEngine, position_limit
from compressor.serve.options import ServeOptions
from compressor.serve.sequence import SamplingParams

VOCAB = 300
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED)),
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=8)),
    "gemma2-softcap-window": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **GROUPED, sliding_window=8, query_pre_attn_scalar=8, attn_implementation="eager"
        )
    ),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
}
POOLS = {
    "chunked": {"max_num_batched_tokens": 16, "max_num_seqs": 8, "num_blocks": 60},
    "preempting": {"max_num_batched_tokens": 9, "max_num_seqs": 4, "num_blocks": 16},
    "uncached": {"num_blocks": 100, "prefix_cache": False},
}


def build(name="llama"):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def prompts():
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (5, 19, 33, 8)]
    return [*texts, texts[2][:24] + texts[0]]


def generate(model, prompt, length):
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=length, do_sample=False)
    return out[0, len(prompt) :].tolist()


def drive(engine):
    """Step to the end; the tokens of each request, with the pool checked after every step."""
    outputs, deltas = {}, []
    while engine.has_work:
        for delta in engine.step():
            outputs.setdefault(delta.request_id, []).extend(delta.token_ids)
            deltas.append(delta)
        engine.scheduler.check()
    return outputs, deltas


@pytest.fixture
def engine():
    engine = LLMEngine(build(), None, ServeOptions(num_blocks=64, block_size=4, max_num_seqs=8))
    yield engine
    engine.close()


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_one_at_a_time_generation(name, pool):
    model = build(name)
    expected = {str(i): generate(model, p, 16) for i, p in enumerate(prompts())}
    engine = LLMEngine(model, None, ServeOptions(**POOLS[pool], block_size=4))
    for index, prompt in enumerate(prompts()):
        engine.add_request(str(index), prompt, SamplingParams(temperature=0, max_tokens=16))
    outputs, _ = drive(engine)
    engine.close()
    assert outputs == expected
    assert (engine.scheduler.stats.num_preemptions > 0) == (pool == "preempting")
    assert generate(model, prompts()[0], 16) == expected["0"]


def test_an_identical_prompt_hits_the_prefix_cache_and_gives_the_same_tokens(engine):
    prompt, params = prompts()[2], SamplingParams(temperature=0, max_tokens=8)
    engine.add_request("a", prompt, params)
    first, _ = drive(engine)
    engine.add_request("b", prompt, params)
    second, deltas = drive(engine)
    assert second["b"] == first["a"]
    assert deltas[0].num_cached_tokens == 32


def test_prompt_logprobs_are_those_of_a_plain_forward_pass(engine):
    prompt = prompts()[1]
    engine.add_request("a", prompt, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2))
    _, (delta,) = drive(engine)
    engine.runner.close()
    with torch.inference_mode():
        logits = engine.runner.model(torch.tensor([prompt])).logits[0]
    expected = torch.log_softmax(logits, -1)[range(len(prompt) - 1), prompt[1:]]
    assert delta.prompt_logprobs[0] is None
    ours = torch.tensor([t.logprob for t in delta.prompt_logprobs[1:]])
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_a_seeded_request_gives_the_same_tokens_alone_and_in_a_batch(engine):
    params = SamplingParams(temperature=1.5, seed=7, max_tokens=12, top_p=0.9, ignore_eos=True)
    engine.add_request("alone", prompts()[0], params)
    alone, _ = drive(engine)
    for index, prompt in enumerate(prompts()):
        engine.add_request(str(index), prompt, params)
    batch, _ = drive(engine)
    assert batch["0"] == alone["alone"]


def test_a_failing_request_fails_alone(engine, monkeypatch):
    run = engine.runner.run

    def fail_on_poison(items):
        if any(i.sequence.request_id == "poison" for i in items):
            raise RuntimeError("boom")
        return run(items)

    monkeypatch.setattr(engine.runner, "run", fail_on_poison)
    for name in ("a", "poison", "b"):
        engine.add_request(name, prompts()[0], SamplingParams(temperature=0, max_tokens=4))
    outputs, deltas = drive(engine)
    errors = [d for d in deltas if d.finish_reason == "error"]
    assert [e.request_id for e in errors] == ["poison"]
    assert "boom" in errors[0].error
    assert len(outputs["a"]) == len(outputs["b"]) == 4
    assert engine.pool.num_free == engine.pool.num_blocks


def test_non_finite_logits_fail_only_their_request(engine):
    table = engine.runner.model.get_input_embeddings().weight
    with torch.no_grad():
        table[299] = float("nan")
    engine.add_request("bad", [299, 5], SamplingParams(temperature=0, max_tokens=2))
    engine.add_request("good", [4, 5], SamplingParams(temperature=0, max_tokens=2))
    _, deltas = drive(engine)
    reasons = {d.request_id: d.finish_reason for d in deltas if d.finish_reason}
    assert reasons["bad"] == "error"
    assert reasons["good"] in ("length", "stop")


def test_aborting_frees_all_blocks(engine):
    engine.add_request("a", prompts()[2], SamplingParams(max_tokens=50))
    engine.step()
    (delta,) = engine.abort(["a", "unknown"])
    assert delta.finish_reason == "abort"
    assert engine.pool.num_free == engine.pool.num_blocks
    assert not engine.has_work


@pytest.mark.parametrize(
    ("prompt", "max_tokens"), [([], 1), ([300], 1), ([-1], 1), ([5] * 250, 10), ([5], 10**12)]
)
def test_requests_that_can_never_run_are_refused_at_once(engine, prompt, max_tokens):
    with pytest.raises(UsageError):
        engine.add_request("a", prompt, SamplingParams(max_tokens=max_tokens))
    assert not engine.has_work


def test_a_model_that_attends_in_another_way_is_refused(monkeypatch):
    model = build()
    plain = model.model.layers[0].forward
    monkeypatch.setattr(
        model.model.layers[0],
        "forward",
        lambda hidden, **kw: plain(hidden, **kw) + hidden.cumsum(1),
    )
    with pytest.raises(UnsupportedError, match="other logits"):
        LLMEngine(model, None, ServeOptions(num_blocks=64))
    assert model.config._attn_implementation == "sdpa"


def test_linear_attention_layers_are_refused_by_name():
    model = build()
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UnsupportedError, match="linear_attention"):
        LLMEngine(model, None, ServeOptions(num_blocks=64))


def test_length_dependent_positions_limit_the_context():
    config = LlamaConfig(**GROUPED)
    config.rope_parameters = {
        "rope_type": "dynamic",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    assert position_limit(config) == 64


def test_a_server_open_to_others_needs_a_key():
    with pytest.raises(UsageError, match="API key"):
        ServeOptions(host="0.0.0.0")
