"""Sound checkpoints of every architecture open without notes and read bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from compressor.modeling.checkpoint import open_checkpoint
from tests.fixtures_models import ARCHITECTURES, VOCAB

Models = Callable[[str], Path]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_is_read_as_the_safetensors_library_reads_it(tiny_models: Models, name: str):
    checkpoint = open_checkpoint(tiny_models(name), strict=True)
    wanted = load_file(tiny_models(name) / "model.safetensors")
    assert set(checkpoint.tensors) == set(wanted)
    assert checkpoint.notes == ()
    assert all(torch.equal(checkpoint.read(n, check_finite=True), t) for n, t in wanted.items())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_tokenizer_of_a_tiny_model_round_trips_within_the_vocabulary(
    tiny_models: Models, name: str
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models(name))
    ids = tokenizer.encode("for café in 日本: x", add_special_tokens=False)
    assert tokenizer.decode(ids) == "for café in 日本: x"
    assert max(ids) < VOCAB == len(tokenizer)
    assert tokenizer.bos_token_id == 1
