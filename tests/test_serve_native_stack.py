"""Models served by the C kernels answer as transformers' own code does."""

import pytest
import torch

from compressor.cli.app import run_command
from compressor.errors import UsageError
from compressor.modeling.load import load_model
from compressor.serve.engine import LLMEngine
from compressor.serve.offline import LLM
from compressor.serve.options import ServeOptions
from compressor.serve.sequence import SamplingParams
from compressor_kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.reason())
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [40, 41], list(range(60, 90))]


@pytest.fixture(scope="module")
def artifact(tiny_models, tmp_path_factory):
    def make(name, scheme="W4A16"):
        root = tmp_path_factory.mktemp(name)
        words = ["quantize", str(tiny_models(name)), "--scheme", scheme, "--method", "rtn"]
        words += ["--group-size", "32", "--num-samples", "2", "--seq-len", "32"]
        words += ["--set", "stages.2.kernels_archs=[]"]
        assert run_command([*words, "-o", str(root / "out"), "--run-dir", str(root / "run")]) == 0
        return root / "out"

    return make


def answers(loaded, *, stack, kept="auto"):
    engine = LLMEngine(loaded.model, None, ServeOptions(num_blocks=64, kv_cache_dtype=kept))
    assert engine.runner.stack is not None
    if not stack:
        engine.runner.stack = None
    with LLM(engine) as llm:
        params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        return [a.token_ids for a in llm.generate(PROMPTS, params)]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_the_stack_gives_the_tokens_of_transformers(artifact, name, activations):
    loaded = load_model(artifact(name), cpu_activations=activations)
    assert answers(loaded, stack=True) == answers(loaded, stack=False)


@pytest.mark.parametrize("kept", ["fp8", "bf16"])
def test_blocks_run_in_c_between_pools_that_round(artifact, kept):
    loaded = load_model(artifact("qwen3"))
    assert answers(loaded, stack=True, kept=kept) == answers(loaded, stack=False, kept=kept)


def test_auto_rounds_the_inputs_of_narrow_weights_only(artifact):
    narrow = load_model(artifact("llama"), cpu_activations="auto").kernels
    wide = load_model(artifact("llama", "W8A16"), cpu_activations="auto").kernels
    assert (set(narrow), set(wide)) == ({"native-int8"}, {"native"})


def test_without_the_library_transformers_serves(artifact, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    loaded = load_model(artifact("llama"), cpu_activations="auto")
    engine = LLMEngine(loaded.model, None, ServeOptions(num_blocks=64))
    assert engine.runner.stack is None
    engine.close()


def test_other_dtypes_and_architectures_are_left_to_transformers(artifact):
    half = load_model(artifact("llama"), dtype=torch.bfloat16)
    other = load_model(artifact("gpt_neox"))
    for loaded in (half, other):
        engine = LLMEngine(loaded.model, None, ServeOptions(num_blocks=64))
        assert engine.runner.stack is None
        engine.close()


def test_unknown_activations_are_refused():
    with pytest.raises(UsageError, match="cpu_activations 'int4' is none of auto, int8, float"):
        ServeOptions(cpu_activations="int4")
