"""A packed artifact, served: its weights stay packed and its texts are those of generate."""

import shutil

import pytest

from compressor.cli.app import run_command
from compressor.errors import CheckpointError
from compressor.serve.offline import generate_text
from compressor.serve.options import ServeOptions
from compressor.serve.sequence import SamplingParams
from compressor.serve.smoke import run_smoke

OPTIONS = ServeOptions(num_blocks=64)


def quantized(model, root, *flags):
    words = ["quantize", str(model), "--scheme", "W4A16", "--method", "rtn", *flags]
    words += ["--group-size", "32", "--num-samples", "2", "--seq-len", "32"]
    words += ["--set", "stages.2.kernels_archs=[]"]
    words += ["-o", str(root / "out"), "--run-dir", str(root / "run")]
    assert run_command(words) == 0
    return root / "out"


@pytest.fixture(scope="module")
def artifact(tiny_models, tmp_path_factory):
    return quantized(tiny_models("llama"), tmp_path_factory.mktemp("packed"))


def test_the_smoke_test_finds_packed_weights_in_memory(artifact):
    result = run_smoke(artifact, OPTIONS, new_tokens=6)
    checks = {c["name"]: c for c in result["checks"]}
    assert all(c["ok"] for name, c in checks.items() if name != "resident bytes"), result
    resident, packed = (int(w) for w in checks["resident bytes"]["detail"].split() if w.isdigit())
    assert resident < 1.25 * packed  # layouts round tiny layers up; 3 % holds for real sizes
    assert "digests of" in result["notes"][0]


def test_a_flipped_bit_in_the_weights_is_found_before_serving(artifact, tmp_path):
    path = shutil.copytree(artifact, tmp_path / "copy")
    shard = next(path.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="bytes of a tensor have changed"):
        generate_text(path, ["x"], params=SamplingParams(max_tokens=1), options=OPTIONS)


def test_an_artifact_with_an_fp8_cache_is_served_with_one(tiny_models, tmp_path):
    path = quantized(tiny_models("qwen3"), tmp_path, "--kv-cache", "fp8")
    result = run_smoke(path, OPTIONS, new_tokens=6)
    checks = {c["name"]: c for c in result["checks"]}
    assert all(c["ok"] for name, c in checks.items() if name != "resident bytes"), result
    assert "keys and values in e4m3" in checks["speed"]["detail"]
