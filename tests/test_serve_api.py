"""The HTTP server, live on 127.0.0.1: what OpenAI's clients and lm-eval get."""

import openai
import pytest
import torch

from compressor.serve.api import ROUTES
from tests.fixtures_serve import Live, build_model


@pytest.fixture(scope="module")
def live():
    server = Live(max_num_seqs=8)
    yield server
    assert server.idle()
    assert server.engine.pool.num_free == server.engine.pool.num_blocks
    server.close()


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{live.port}/v1", api_key="x", max_retries=0
    ) as client:
        yield client


def complete(live, **body):
    return live.ask("/v1/completions", {"temperature": 0, "prompt": "Hello", **body})


def test_the_openai_client_completes_text_as_transformers_does(live, client):
    answer = client.completions.create(model="tiny", prompt="Hello", temperature=0, max_tokens=8)
    ids = live.tokenizer("Hello", return_tensors="pt")
    reference = build_model().generate(**ids, max_new_tokens=8, do_sample=False)[0, 5:]
    expected = live.tokenizer.decode(reference, skip_special_tokens=True)
    assert answer.choices[0].text == expected
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == len(reference)


def test_the_openai_client_streams_the_same_text(client):
    asked = {"model": "tiny", "prompt": "Hello", "temperature": 0, "max_tokens": 20}
    whole = client.completions.create(**asked).choices[0]
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.text
    reasons = [c.choices[0].finish_reason for c in chunks]
    assert reasons[-1] == whole.finish_reason
    assert not any(reasons[:-1])


def test_the_openai_client_chats_with_logprobs_and_usage(live, client):
    messages = [{"role": "user", "content": "Hi"}]
    asked = {"model": "tiny", "messages": messages, "max_tokens": 6, "seed": 1}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, n=2)
    assert [c.index for c in answer.choices] == [0, 1]
    assert answer.choices[0].message.role == "assistant"
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 3
    assert answer.usage.prompt_tokens == len("<user>Hi\n<assistant>")
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == answer.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 6


def test_the_openai_client_lists_the_model(client):
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_lists_of_prompts_and_token_ids_are_answered_in_order(live):
    ids = live.tokenizer.encode("Hello")
    texts = [complete(live, prompt=p)[2]["choices"] for p in ("Hello", ["Hello", "x"], ids, [ids])]
    assert [c["index"] for c in texts[1]] == [0, 1]
    assert {t[0]["text"] for t in texts} == {texts[0][0]["text"]}


def test_echo_with_logprobs_scores_the_prompt(live):
    _, _, body = complete(live, echo=True, logprobs=1, max_tokens=1)
    choice = body["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"].startswith("Hello")
    assert logprobs["tokens"][:5] == list("Hello")
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["text_offset"][:6] == [0, 1, 2, 3, 4, 5]
    assert all(v <= 0 for v in logprobs["token_logprobs"][1:])
    assert len(logprobs["top_logprobs"]) == 6


def test_echo_without_new_tokens_gives_only_the_prompt(live):
    _, _, body = complete(live, echo=True, logprobs=0, max_tokens=0)
    assert body["choices"][0]["text"] == "Hello"
    assert body["usage"]["completion_tokens"] == 0


def test_a_stop_string_ends_the_text_before_it(live):
    text = complete(live, max_tokens=12)[2]["choices"][0]["text"]
    stop = text[3:5]
    body = complete(live, max_tokens=12, stop=stop)[2]
    assert body["choices"][0]["text"] == text.split(stop)[0]
    assert body["choices"][0]["finish_reason"] == "stop"


def test_tokens_go_to_text_and_back(live):
    ids = live.ask("/tokenize", {"prompt": "é!"})[2]["tokens"]
    assert live.ask("/detokenize", {"tokens": ids})[2]["prompt"] == "é!"
    count = live.ask("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]})[2]["count"]
    assert count == len("<user>Hi\n<assistant>")


def test_a_failing_template_is_the_callers_error(live):
    body = {"messages": [{"role": "bad", "content": "x"}]}
    status, _, answer = live.ask("/v1/chat/completions", body)
    assert status == 400
    assert "no bad" in answer["error"]["message"]


def test_text_parts_are_joined_and_images_refused(live):
    text = {"type": "text", "text": "Hi"}
    image = {"type": "image_url", "image_url": {"url": "x"}}
    for parts, status in (([text], 200), ([text, image], 400)):
        body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}
        assert live.ask("/v1/chat/completions", body)[0] == status


def test_metrics_have_vllm_names_and_count_tokens(live):
    complete(live)
    assert live.idle()
    text = live.ask("/metrics")[2]
    for name in (
        "vllm:num_requests_running",
        "vllm:kv_cache_usage_perc",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_sum",
        "vllm:request_success_total",
        "vllm:prefix_cache_hits_total",
    ):
        assert name in text
    assert 'vllm:num_requests_running{model_name="tiny"} 0.0' in text


def test_health_shows_the_heartbeat(live):
    status, _, body = live.ask("/health")
    assert status == 200
    assert body["heartbeat_age_s"] < 5


def test_lm_eval_scores_equal_those_of_a_plain_forward_pass(live):
    pytest.importorskip("tenacity")  # of lm-eval[api]
    lm_eval = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance

    lm = lm_eval.LocalCompletionsAPI(
        base_url=f"http://127.0.0.1:{live.port}/v1/completions",
        model="tiny",
        tokenizer_backend="remote",
        num_concurrent=1,
        max_retries=1,
    )
    pairs = [("The cat", " sat"), ("One two", " three four"), ("a", "b")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = lm.loglikelihood(requests)
    model = build_model()
    for (context, text), (value, is_greedy) in zip(pairs, found, strict=True):
        ids = live.tokenizer.encode(context + text)
        start = len(live.tokenizer.encode(context))
        with torch.inference_mode():
            logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        expected = sum(float(logprobs[p - 1, ids[p]]) for p in range(start, len(ids)))
        greedy = all(int(logprobs[p - 1].argmax()) == ids[p] for p in range(start, len(ids)))
        assert value == pytest.approx(expected, abs=1e-3)
        assert is_greedy == greedy


def test_lm_eval_reads_our_answer_to_its_own_payload(live):
    lm_eval = pytest.importorskip("lm_eval.models.openai_completions")
    ids = live.tokenizer.encode("The cat sat")
    body = {"model": "tiny", "prompt": [ids], "temperature": 0, "max_tokens": 1, "logprobs": 1}
    answer = live.ask("/v1/completions", {**body, "seed": 1234, "echo": True})[2]
    ((value, _),) = lm_eval.LocalCompletionsAPI.parse_logprobs(answer, [ids], [7])
    with torch.inference_mode():
        logprobs = torch.log_softmax(build_model()(torch.tensor([ids])).logits[0], -1)
    expected = sum(float(logprobs[p - 1, ids[p]]) for p in range(7, len(ids)))
    assert value == pytest.approx(expected, abs=1e-3)


def test_every_route_but_the_probes_needs_the_key():
    server = Live(api_key="secret")
    try:
        for path, (method, _) in ROUTES.items():
            body = b"{}" if method == "POST" else None
            expected = {200} if path in ("/health", "/livez", "/readyz") else {401}
            assert {server.ask(path, body, method)[0]} == expected
        for key in ("Bearer secre", "Bearer secrets", "secret", "Bearer ", "Bearer s\xe9cret"):
            assert server.ask("/v1/models", headers={"authorization": key})[0] == 401
        assert server.ask("/v1/models", headers={"authorization": "Bearer secret"})[0] == 200
        connection = server.connect()
        connection.putrequest("GET", "/v1/models")
        for _ in range(2):
            connection.putheader("authorization", "Bearer secret")
        connection.endheaders()
        assert connection.getresponse().status == 401
        connection.close()
    finally:
        server.close()
