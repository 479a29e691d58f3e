"""A tiny model behind a live server in a thread, for the tests of the HTTP API."""

import http.client
import json
import threading
import time

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compressor.serve.api import create_app
from compressor.serve.engine import LLMEngine
from compressor.serve.options import ServeOptions
from compressor.serve.server import DrainingServer, bind, server_config

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no bad') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer():
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def build_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


class Live:
    """A server in a thread, and a plain client for it."""

    def __init__(self, **options):
        self.options = ServeOptions(served_model_name="tiny", num_blocks=256, **options)
        self.model, self.tokenizer = build_model(), build_tokenizer()
        self.engine = LLMEngine(self.model, self.tokenizer, self.options)
        app = create_app(self.engine, self.options)
        self.serving = app.state.serving
        self.serving.worker.start()
        listener = bind("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.server = DrainingServer(server_config(app), self.serving)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def close(self):
        self.server.should_exit = True
        self.thread.join(10)
        self.serving.worker.stop()
        self.serving.texts.close()

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def ask(self, path, body=None, method=None, headers=None):
        """(status, headers, parsed body or text) of one request."""
        connection = self.connect()
        data = json.dumps(body).encode() if isinstance(body, dict | list) else body
        connection.request(method or ("GET" if body is None else "POST"), path, data, headers or {})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        is_json = "json" in response.headers.get("content-type", "")
        return response.status, response.headers, json.loads(text) if is_json else text

    def idle(self, seconds=5.0):
        """Wait until no sequence is left; True when that happened."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.serving.worker.num_unfinished and not self.engine.has_work:
                return True
            time.sleep(0.01)
        return False
