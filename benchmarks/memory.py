"""Peak memory of quantizing a model that is larger than the memory allowed: 4 GB within 2.5 GB.

    python -m benchmarks memory [--layers 16] [--methods rtn gptq] [--work DIR] [--out FILE]

Builds a random Llama (hidden 4096, intermediate 7168, 32 heads, 8 of them for keys and values) in
bf16, shard by shard, and runs calibrate -> quantize W4A16 g128 -> pack -> verify in a process of
its own. Peak = the larger of `ru_maxrss` and the sampled VmRSS of that process. Evaluation is left
out: it holds whole models. This process imports no torch, so that the child inherits nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LIMIT_BYTES = 2_500_000_000
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS = 4096, 7168, 32, 8
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
Shapes = dict[str, tuple[int, ...]]


def main(arguments: list[str]) -> None:
    """Build the model, measure each method, write one JSON object."""
    options = _parse(arguments)
    work = (options.work or Path(tempfile.mkdtemp(prefix="compressor-memory-"))).absolute()
    model = build_model(work / f"model-{options.layers}", layers=options.layers)
    rows = [_measure(method, model, work, options) for method in options.methods]
    size = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    body = {
        "model_bytes": size,
        "layers": options.layers,
        "calibration": [options.rows, options.length],
        "limit_bytes": LIMIT_BYTES,
        "threads": options.threads,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "runs": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(rows) + "\n")
    if options.work is None:
        shutil.rmtree(work)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--methods", nargs="*", default=["rtn", "gptq"])
    parser.add_argument("--grid", default="mse")
    parser.add_argument("--threads", default=str(os.cpu_count()))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory.json"))
    return parser.parse_args(arguments)


def build_model(path: Path, *, layers: int, vocabulary: int = 4096) -> Path:
    """Write the checkpoint, one shard for each layer; a finished folder is used again."""
    if (path / "config.json").is_file():
        return path
    path.mkdir(parents=True, exist_ok=True)
    outer: Shapes = {
        "model.embed_tokens.weight": (vocabulary, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (vocabulary, HIDDEN),
    }
    shards = [outer] + [_layer_shapes(i) for i in range(layers)]
    index: dict[str, str] = {}
    for number, shapes in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(path / name, shapes, np.random.default_rng(number))
        index |= dict.fromkeys(shapes, name)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (path / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    source = Path(__file__).parent.parent / "compressor/reference_model/base"
    for file in TOKENIZER:
        shutil.copyfile(source / file, path / file)
    (path / "config.json").write_text(_config(layers, vocabulary), encoding="utf-8")
    return path


def _layer_shapes(layer: int) -> Shapes:
    kv = HIDDEN // HEADS * KV_HEADS
    shapes: Shapes = {
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    return {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def _config(layers: int, vocabulary: int) -> str:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
    }
    return json.dumps(config, indent=1)


def _write_shard(path: Path, shapes: Shapes, random: np.random.Generator) -> None:
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            for piece in _values(shape, random):
                file.write(piece.tobytes())


def _values(shape: tuple[int, ...], random: np.random.Generator) -> Iterator[NDArray[np.uint16]]:
    """bf16 bits: ones for norms, normal numbers of variance 1 / inputs for matrices."""
    if len(shape) == 1:
        yield _bfloat16(np.ones(shape, np.float32))
        return
    for start in range(0, shape[0], 512):
        rows = min(512, shape[0] - start)
        piece = random.standard_normal((rows, shape[1]), np.float32)
        yield _bfloat16(piece / np.float32(np.sqrt(shape[1])))


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _recipe(method: str, model: Path, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    data = {"source": "reference", "num_samples": options.rows, "seq_len": options.length}
    return {
        "name": f"memory-{method}",
        "model": {"path": str(model)},
        "output": str(output),
        "samples": 0,
        "stages": [
            {"kind": "calibrate", "data": {**data, "packing": "packed"}},
            {"kind": "quantize", "scheme": "W4A16", "group_size": 128, "method": method,
             "grid": options.grid},
            {"kind": "pack", "kernels_archs": []},
            {"kind": "verify", "tokens": 16},
        ],
    }  # fmt: skip


def _measure(method: str, model: Path, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    output = work / f"out-{method}"
    for folder in (output, work / f"out-{method}.run"):
        shutil.rmtree(folder, ignore_errors=True)
    recipe = work / f"{method}.yaml"
    recipe.write_text(json.dumps(_recipe(method, model, output, options)), encoding="utf-8")
    start = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": options.threads, "HF_HUB_OFFLINE": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", "compressor", "run", str(recipe), "--json"], env=environment
    )
    peak, status, usage = _watch(child.pid)
    size = sum(f.stat().st_size for f in output.glob("*.safetensors"))
    largest = max(peak, usage * 1024)
    return {
        "method": method,
        "exit": os.waitstatus_to_exitcode(status),
        "max_rss_bytes": usage * 1024,
        "sampled_rss_bytes": peak,
        "seconds": round(time.monotonic() - start, 1),
        "artifact_bytes": size,
        "within_limit": largest < LIMIT_BYTES,
        "by_stage": _by_stage(work / f"out-{method}.run" / "log.jsonl"),
    }


def _watch(pid: int) -> tuple[int, int, int]:
    """Largest sampled VmRSS in bytes, exit status, and ru_maxrss in KiB of the child."""
    peak = 0
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return peak, status, usage.ru_maxrss
        peak = max(peak, _resident(pid))
        time.sleep(0.05)


def _resident(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _by_stage(log: Path) -> dict[str, float]:
    """Seconds of each finished stage."""
    events = [json.loads(line) for line in log.read_text().splitlines()]
    return {e["stage"]: e["s"] for e in events if e["event"] == "stage finished"}
