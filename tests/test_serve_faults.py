"""What goes wrong at the server's door (fault ids SV01-SV33): each fault, its answer, no damage."""

import asyncio
import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from compressor.errors import ResourceError
from compressor.serve import server
from compressor.serve.generation import Generation
from compressor.serve.limits import Limits
from compressor.serve.protocol import ApiError
from compressor.serve.sequence import Delta, SamplingParams
from compressor.serve.worker import Job
from tests.fixtures_serve import Live

LONG = {"prompt": "Hello", "max_tokens": 400, "ignore_eos": True, "temperature": 0}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def live():
    served = Live(max_num_seqs=4, max_queue=4, body_timeout_s=1.0)
    yield served
    assert served.idle()
    assert served.engine.pool.num_free == served.engine.pool.num_blocks
    served.close()


def raw(live, data, *, wait=10.0):
    """All bytes the server answers to these bytes."""
    with socket.create_connection(("127.0.0.1", live.port), timeout=wait) as connection:
        connection.sendall(data)
        received = b""
        try:
            while chunk := connection.recv(65536):
                received += chunk
        except (ConnectionResetError, TimeoutError):
            pass
    return received


def post(body, extra=b""):
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + extra
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"prompt": "x",}', "line 1 column 16"),
        (b"", "line 1 column 1"),
        (b"[1]", "JSON object"),
        (b"null", "JSON object"),
        (b'{"prompt": "x", "temperature": NaN}', "NaN"),
        (b'{"prompt": "x", "temperature": -Infinity}', "Infinity"),
        (b'{"prompt": "x", "temperature": 1e999}', "too large"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "x", "stop": ["\\udfff"]}', "surrogate"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b'{"prompt": "a", "prompt": "b"}', "twice"),
        (b"[" * 100_000, "nested"),
        (b'{"prompt": ' + b"1" * 5000 + b"}", "JSON"),
    ],
)
def test_a_body_that_is_not_json_gets_400_and_the_place(live, body, text):
    status, _, answer = live.ask(COMPLETIONS, body)
    assert status == 400
    assert text in answer["error"]["message"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 10**6), ("n", 0), ("n", True), ("n", "3"), ("n", 1.5), ("best_of", 10**6),
        ("best_of", 2), ("max_tokens", 10**12), ("max_tokens", -1), ("max_tokens", 1.0),
        ("max_tokens", True), ("max_tokens", "3"), ("max_tokens", 600), ("max_tokens", 0),
        ("temperature", -1), ("temperature", 1e308), ("temperature", "1"), ("top_p", 0),
        ("top_p", 2), ("top_k", -2), ("min_p", 1.1), ("presence_penalty", 3),
        ("frequency_penalty", -3), ("seed", 2**70), ("logprobs", -1), ("logprobs", 21),
        ("logprobs", 258), ("prompt_logprobs", -1), ("prompt_logprobs", 1), ("stop", ""),
        ("stop", ["a"] * 17), ("stop", 3), ("logit_bias", {"x": 1}), ("logit_bias", {"1": 101}),
        ("logit_bias", {"999": 1}), ("min_tokens", 20), ("suffix", "x"), ("stream", "yes"),
        ("stream_options", {"include_usage": True}), ("response_format", {"type": "json_object"}),
        ("prompt", []), ("prompt", ""), ("prompt", None), ("prompt", [[]]), ("prompt", [1, "a"]),
        ("prompt", [True]), ("prompt", [-1]), ("prompt", [258]), ("prompt", [10**30]),
        ("prompt", "x" * 10_000), ("prompt", ["x"] * 1000), ("model", 3),
    ],
)  # fmt: skip
def test_a_value_out_of_bounds_gets_400_with_its_name(live, name, value):
    status, _, answer = live.ask(COMPLETIONS, {"prompt": "Hello", name: value})
    assert status == 400, answer
    assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "extra",
    [
        {"top_logprobs": 21, "logprobs": True},
        {"top_logprobs": 2},
        {"messages": []},
        {"messages": "x"},
        {"messages": [{"content": "x"}]},
        {"messages": [{"role": "user", "content": 3}]},
        {"tools": [{"type": "function"}]},
        {"max_completion_tokens": 0},
        {"chat_template_kwargs": {"tokenize": True}},
    ],
)
def test_a_wrong_chat_request_gets_400(live, extra):
    body = {"messages": [{"role": "user", "content": "x"}], **extra}
    assert live.ask(CHAT, body)[0] == 400


def test_an_unknown_field_gets_a_warning_or_400_when_strict(live):
    body = {"prompt": "x", "max_tokens": 1, 'temprature\r\nx: "y': 1}
    status, headers, _ = live.ask(COMPLETIONS, body)
    assert status == 200
    assert "temprature" in headers["warning"]
    strict = Live(strict_api=True)
    assert strict.ask(COMPLETIONS, body)[0] == 400
    strict.close()


def test_another_model_name_gets_404(live):
    status, _, body = live.ask(COMPLETIONS, {"prompt": "x", "model": "gpt-4"})
    assert status == 404
    assert body["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 50000000\r\n\r\n",
        b"content-length: 9" + b"9" * 30 + b"\r\n\r\n",
        b"transfer-encoding: chunked\r\n\r\n" + b"10000\r\n" + b" " * 65536 + b"\r\n",
    ],
)
def test_a_body_above_the_cap_gets_413_before_it_is_read(live, head):
    data = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" + head
    if b"chunked" in head:
        data += (b"10000\r\n" + b" " * 65536 + b"\r\n") * 80
    assert raw(live, data).startswith((b"HTTP/1.1 413", b"HTTP/1.1 400"))


def test_many_large_bodies_at_once_get_429(live):
    limits = Limits(None, live.options)
    cap = live.options.max_body_bytes
    for _ in range(32):
        limits.hold(cap, cap)
    with pytest.raises(ApiError) as refused:
        limits.hold(cap, cap)
    assert refused.value.status == 429


def test_a_body_that_never_ends_is_cut_off(live):
    started = time.monotonic()
    data = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{"
    assert raw(live, data).startswith(b"HTTP/1.1 408")
    assert time.monotonic() - started < 5


def test_headers_that_never_end_are_cut_off(live, monkeypatch):
    monkeypatch.setattr(server, "_HEADER_TIMEOUT_S", 0.2)
    started = time.monotonic()
    assert raw(live, b"GET /health HTTP/1.1\r\nhost: x\r\n") == b""
    assert raw(live, b"") == b""
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "data",
    [
        b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"x: y\r\n" * 20_000 + b"\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 200_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nx: a\0b\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        post(b"{}", b"transfer-encoding: chunked\r\ncontent-length: 5\r\n"),
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_broken_http_gets_400_and_a_closed_connection(live, data):
    answer = raw(live, data + b"\r\n\r\n")
    assert answer == b"" or b" 400 " in answer[:20] or b" 431 " in answer[:20]
    assert live.ask("/health")[0] == 200


@pytest.mark.parametrize("path", ["//v1/models", "/v1/../metrics", "/v1/%2e%2e/metrics", "/nope"])
def test_odd_paths_get_404(live, path):
    assert live.ask(path)[0] == 404


def test_a_request_id_is_kept_when_it_is_harmless(live):
    assert live.ask("/health", headers={"x-request-id": "abc-1"})[1]["x-request-id"] == "abc-1"
    assert live.ask("/health", headers={"x-request-id": "a b"})[1]["x-request-id"] != "a b"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(live, stream):
    connection = live.connect()
    connection.request("POST", COMPLETIONS, json.dumps({**LONG, "n": 2, "stream": stream}))
    while not live.engine.scheduler.running:
        time.sleep(0.005)
    connection.close()
    assert live.idle(2.0)
    assert live.engine.pool.num_free == live.engine.pool.num_blocks


def test_a_failing_request_gets_500_and_the_server_goes_on(live, monkeypatch):
    run = live.engine.runner.run

    def fail_on_poison(items):
        if any(i.sequence.prompt[0] == 7 for i in items):
            raise RuntimeError("boom")
        return run(items)

    monkeypatch.setattr(live.engine.runner, "run", fail_on_poison)
    for _ in range(3):
        status, headers, body = live.ask(COMPLETIONS, {"prompt": [7, 8]})
        assert status == 500
        assert headers["x-request-id"] in body["error"]["message"]
    assert live.ask("/readyz")[0] == 503
    text = live.ask(COMPLETIONS, {"prompt": [7, 8], "stream": True})[2]
    assert '"error"' in text
    assert live.ask(COMPLETIONS, {"prompt": "x"})[0] == 200
    assert live.ask("/readyz")[0] == 200


def test_too_many_requests_get_429_at_once(live):
    statuses, waits = [], []

    def ask():
        started = time.monotonic()
        status, headers, _ = live.ask(COMPLETIONS, {**LONG, "max_tokens": 60})
        statuses.append(status)
        if status == 429:
            assert headers["retry-after"] == "1"
            waits.append(time.monotonic() - started)

    threads = [threading.Thread(target=ask) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 8
    assert max(waits) < 5


def test_a_reader_that_does_not_read_is_cut_off_and_others_are_not():
    async def flood():
        jobs = [Job("slow", (1,), SamplingParams())]
        generation = Generation(worker, jobs, buffer=4)
        deltas = generation.deltas()
        await anext(deltas)
        for _ in range(10):
            sinks["slow"](Delta("slow", (1,), "x"))
        await asyncio.sleep(0.01)
        with pytest.raises(ApiError, match="does not read"):
            await anext(deltas)

    sinks, cancelled = {}, []

    def submit(job, sink):
        sinks[job.request_id] = sink
        sink(Delta(job.request_id, (1,), "x"))

    worker = SimpleNamespace(submit=submit, cancel=lambda ids: cancelled.extend(ids))
    asyncio.run(flood())
    assert "slow" in cancelled


def test_draining_refuses_new_work_and_lets_running_work_end():
    served = Live(drain_timeout_s=20)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(served.ask(COMPLETIONS, LONG)))
    thread.start()
    while not served.engine.scheduler.running:
        time.sleep(0.005)
    served.server.handle_exit(15, None)
    assert served.ask("/readyz")[0] == 503
    assert served.ask(COMPLETIONS, {"prompt": "x"})[0] == 503
    thread.join()
    served.thread.join(10)
    assert not served.thread.is_alive()
    assert answers[0][0] == 200
    assert answers[0][2]["usage"]["completion_tokens"] == 400
    served.close()


def test_draining_cuts_what_takes_too_long():
    served = Live(drain_timeout_s=0.2)
    run = served.engine.runner.run
    served.engine.runner.run = lambda items: time.sleep(0.05) or run(items)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(served.ask(COMPLETIONS, LONG)))
    thread.start()
    while not served.engine.scheduler.running:
        time.sleep(0.005)
    served.server.handle_exit(15, None)
    thread.join(10)
    served.thread.join(10)
    assert answers[0][0] == 503
    served.close()


def test_other_origins_get_no_permission(live):
    headers = {"origin": "http://evil", "access-control-request-method": "POST"}
    _, found, _ = live.ask(COMPLETIONS, None, "OPTIONS", headers)
    assert not [name for name in found if name.lower().startswith("access-control")]


def test_prompts_do_not_reach_the_log(live, caplog):
    caplog.set_level("DEBUG")
    assert live.ask(COMPLETIONS, {"prompt": "SECRETWORD", "max_tokens": 2})[0] == 200
    assert live.ask(COMPLETIONS, {"prompt": "SECRETWORD", "max_tokens": -2})[0] == 400
    assert "SECRETWORD" not in caplog.text


def test_a_busy_port_is_found_before_loading(live):
    with pytest.raises(ResourceError, match="cannot listen"):
        server.bind("127.0.0.1", live.port)
