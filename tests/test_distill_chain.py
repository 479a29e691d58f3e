"""Prune, distill from a cache, store in 4 bit, evaluate, load elsewhere and serve: one recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.cli.app import run_command
from compressor.modeling.load import load_model
from compressor.serve.offline import LLM
from compressor.serve.options import ServeOptions
from compressor.serve.sequence import SamplingParams
from tests.fixtures_pipeline import execute, recipe, stages

Models = Callable[[str], Path]
pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture
def chain(tmp_path: Path) -> list[dict[str, Any]]:
    first, quantize, *rest = stages(tmp_path)
    teacher = {"targets": "top_k", "count": 16, "cache": str(tmp_path / "secret-folder" / "kept")}
    keys = {
        "kind": "distill",
        "data": first["data"],
        "steps": 4,
        "batch_size": 2,
        "teacher": teacher,
    }
    cuts: list[dict[str, Any]] = [{"depth": [0, 2]}, {"width": {"mlp": 0.5}}]
    cycles = [s for cut in cuts for s in ({"kind": "prune", **cut}, keys)]
    return [first, *cycles, first, quantize, *rest]


def test_a_model_that_was_cut_and_healed_twice_loads_in_transformers_and_is_served(
    tiny_models: Models, tmp_path: Path, chain: list[dict[str, Any]], capsys: Any
) -> None:
    out = execute(recipe(tiny_models("gemma3"), tmp_path, stages=chain)).output
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert model.config.num_hidden_layers == 2
    generator = torch.Generator().manual_seed(4)  # best tokens lead by 3 % of the range
    tokens = torch.randint(3, 320, (2, 16), generator=generator)
    with torch.no_grad():
        wanted = model(tokens).logits
        found = load_model(out, packed=True, dtype=torch.float32).model(tokens).logits
    assert (found - wanted).norm() <= 1e-3 * wanted.norm()
    assert served(out, tokens) == written(model, tokens)
    words = ["generate", str(out), "--prompt", "def read", "--max-tokens", "4", "--json"]
    assert run_command(words) == 0
    assert capsys.readouterr().out
    assert not any(b"secret-folder" in f.read_bytes() for f in out.rglob("*") if f.is_file())


def served(folder: Path, prompts: torch.Tensor) -> list[list[int]]:
    """Eight greedy tokens behind each prompt, from our engine."""
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with LLM.open(folder, ServeOptions(num_blocks=64, dtype="float32")) as llm:
        return [text.token_ids for text in llm.generate(prompts.tolist(), params)]


@torch.no_grad()
def written(model: Any, prompts: torch.Tensor) -> list[list[int]]:
    """The same from a model of transformers', one whole pass for each token."""
    tokens = prompts
    for _ in range(8):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    found: list[list[int]] = tokens[:, prompts.shape[1] :].tolist()
    return found


def test_both_cycles_learn_from_the_same_kept_teacher(
    tiny_models: Models, tmp_path: Path, chain: list[dict[str, Any]]
) -> None:
    execute(recipe(tiny_models("gemma3"), tmp_path, stages=chain))
    assert len(list((tmp_path / "secret-folder" / "kept").iterdir())) == 1
