"""Which ids end a text: the first source that names any decides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from compressor.modeling.endings import end_of_text_ids

Models = Callable[[str], Path]


def test_the_generation_config_is_asked_before_the_model_and_its_tokenizer(
    tiny_models: Models,
) -> None:
    config = AutoConfig.from_pretrained(tiny_models("llama"), eos_token_id=7)
    model = AutoModelForCausalLM.from_config(config)
    tokenizer = SimpleNamespace(eos_token_id=9)
    model.generation_config = GenerationConfig(eos_token_id=[3, 5])
    assert end_of_text_ids(model, tokenizer) == {3, 5}
    model.generation_config = None
    assert end_of_text_ids(model, tokenizer) == {7}
    model.config.eos_token_id = None
    assert end_of_text_ids(model, tokenizer) == {9}
    assert end_of_text_ids(model) == frozenset()
