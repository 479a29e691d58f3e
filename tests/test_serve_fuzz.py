"""Random traffic and random bytes: no dead engine, no leaked block, no answer of 500."""

import contextlib
import json
import os
import random
import socket

import pytest
import torch

from compressor.serve.engine import LLMEngine
from compressor.serve.options import ServeOptions
from compressor.serve.sequence import SamplingParams
from tests.fixtures_serve import Live, build_model

COUNT = int(os.environ.get("COMPRESSOR_FUZZ_REQUESTS", "250"))
VALUES = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**70), 0.5, 1e308, -0.0, "", "x", "é🙂", "\0",
    "\x7f", [], [[]], [1, 2], ["a", "b"], [None], {}, {"a": 1}, [[1], "x"], "a" * 5000, [257] * 600,
]  # fmt: skip
FIELDS = [
    "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stop", "stream",
    "logprobs", "top_logprobs", "echo", "seed", "logit_bias", "messages", "stream_options",
    "ignore_eos", "min_tokens", "model", "best_of", "tools", "presence_penalty", "tokens",
    "stop_token_ids", "chat_template_kwargs", "add_special_tokens", "suffix", "user", "odd\n",
]  # fmt: skip
PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]


@pytest.fixture(scope="module")
def live():
    server = Live(max_num_seqs=4, max_queue=64, body_timeout_s=0.5)
    yield server
    assert server.idle(20)
    assert server.ask("/health")[0] == 200
    assert server.engine.pool.num_free == server.engine.pool.num_blocks
    server.close()


def random_body(rng):
    body = {"prompt": rng.choice(["Hi", [1, 2, 3], ["a", "b"]]), "max_tokens": rng.randrange(1, 9)}
    if rng.random() < 0.5:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    for _ in range(rng.randrange(3)):
        body[rng.choice(FIELDS)] = rng.choice(VALUES)
    return body


def test_random_fields_never_give_500(live):
    rng = random.Random(0)
    seen = set()
    for _ in range(COUNT):
        body = random_body(rng)
        status, _, answer = live.ask(rng.choice(PATHS), body)
        assert status in (200, 400, 404), (body, answer)
        seen.add(status)
    assert seen == {200, 400, 404}


def test_damaged_bytes_never_give_500(live):
    rng = random.Random(1)
    for _ in range(COUNT):
        data = bytearray(json.dumps(random_body(rng)).encode())
        for _ in range(rng.randrange(1, 6)):
            place = rng.randrange(len(data))
            data[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        assert live.ask(PATHS[0], bytes(data))[0] in (200, 400, 404, 413)


def test_clients_that_leave_at_any_time_do_no_harm(live):
    rng = random.Random(2)
    for _ in range(COUNT // 5):
        body = {"prompt": "Hi", "max_tokens": 200, "ignore_eos": True, "n": rng.randrange(1, 4)}
        data = json.dumps({**body, "stream": rng.random() < 0.5}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(data)
        with socket.create_connection(("127.0.0.1", live.port), timeout=5) as connection:
            connection.sendall((head + data)[: rng.randrange(1, len(head + data) * 2)])
            if rng.random() < 0.5:
                connection.settimeout(rng.random() * 0.05 + 0.001)
                with contextlib.suppress(TimeoutError):
                    connection.recv(100)
    assert live.idle(10)


@pytest.mark.parametrize("seed", range(3))
def test_random_arrivals_and_aborts_keep_greedy_texts_exact(seed):
    rng, model = random.Random(seed), build_model()
    starts = [[rng.randrange(250) for _ in range(20)] for _ in range(2)]
    prompts = [[*rng.choice(starts)[: rng.randrange(1, 20)], rng.randrange(250)] for _ in range(12)]
    expected = [greedy(model, p, 12) for p in prompts]
    options = ServeOptions(num_blocks=20, block_size=4, max_num_seqs=5, max_num_batched_tokens=11)
    engine = LLMEngine(model, None, options)
    waiting, found, aborted = list(range(12)), {}, set()
    while waiting or engine.has_work:
        if waiting and rng.random() < 0.4:
            index = waiting.pop()
            params = SamplingParams(temperature=0, max_tokens=12)
            engine.add_request(str(index), prompts[index], params)
        if rng.random() < 0.02:
            aborted |= {d.request_id for d in engine.abort([str(rng.randrange(12))])}
        for delta in engine.step():
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
        engine.scheduler.check()
    engine.close()
    for index, tokens in enumerate(expected):
        if str(index) not in aborted:
            assert found[str(index)] == tokens
    assert engine.pool.num_free == engine.pool.num_blocks


def greedy(model, prompt, length):
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=ids >= 0, max_new_tokens=length, do_sample=False)
    return out[0, len(prompt) :].tolist()
