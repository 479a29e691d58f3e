"""Run one other tool on one model, on given tokens, and save what it made as a dense checkpoint.

    PEER_PYTHON benchmarks/peers.py '{"tool": "llmc-gptq", "model": DIR, "tokens": FILE.pt,
                                      "bits": 4, "group": 32, "symmetric": true, "out": DIR}'

It imports nothing of this project and runs with the tool's own interpreter (`make bench-peers`), in
a process of its own. All linears of the decoder blocks are quantized; embeddings, norms and the
head stay. The saved weights are code x scale, multiplied out by the tool's own code, in float32.

The last line on stdout is JSON: `seconds` of the tool's own call (loading the model, exporting and
saving left out); of the whole process, imports included, `cpu_seconds` and `peak_mib`, its largest
resident size.

group -1 = one scale for each output channel. tokens: int64 [N, T].
"""

# mypy: disable-error-code="import-not-found"
from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Job = dict[str, Any]
Weights = dict[str, Tensor]  # dense float32 weights by linear name
BATCH = 8


def main() -> None:
    """Run the job given as the only argument."""
    job: Job = json.loads(sys.argv[1])
    torch.manual_seed(0)
    seconds, weights = TOOLS[job["tool"]](job)
    write_dense(Path(job["model"]), weights, Path(job["out"]))
    sys.stdout.write("\n" + json.dumps({"seconds": round(seconds, 2), **costs()}) + "\n")


def costs() -> dict[str, float]:
    """What this process took so far, on a busy machine too: CPU seconds and peak memory."""
    return {"cpu_seconds": round(time.process_time(), 1), "peak_mib": round(peak_mib(), 1)}


def peak_mib() -> float:
    """Largest resident size of this process in MiB (`ru_maxrss` would inherit the parent's)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def write_dense(model: Path, weights: Weights, out: Path) -> None:
    """The original checkpoint in float32 with the given linears replaced; none may be missing."""
    from safetensors.torch import load_file, save_file

    tensors = {n: t.float() for f in model.glob("*.safetensors") for n, t in load_file(f).items()}
    expected = {n for n, t in tensors.items() if ".layers." in n and t.ndim == 2}
    if expected != {f"{name}.weight" for name in weights}:
        raise SystemExit(f"the tool left out {sorted(expected - {f'{n}.weight' for n in weights})}")
    for name, weight in weights.items():
        shape = tensors[f"{name}.weight"].shape
        tensors[f"{name}.weight"] = weight.detach().float().reshape(shape).contiguous().clone()
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for file in model.iterdir():
        if file.suffix in (".json", ".jinja") and "index" not in file.name:
            shutil.copy(file, out / file.name)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    text = json.dumps(config | {"dtype": "float32"}, indent=1)
    (out / "config.json").write_text(text, encoding="utf-8")


def load(job: Job) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)


def tokenizer_of(job: Job) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(job["model"])


def _linears(model: Any) -> dict[str, Any]:
    """The linears of the decoder blocks by name."""
    found = model.named_modules()
    return {n: m for n, m in found if isinstance(m, torch.nn.Linear) and ".layers." in n}


def weights_of(model: Any) -> Weights:
    return {n: m.weight.data for n, m in _linears(model).items()}


def oneshot_seconds(job: Job, model: Any, modifier: Any, pipeline: str) -> float:
    """Let llm-compressor change a model by one modifier on the job's tokens."""
    from datasets import Dataset
    from llmcompressor import oneshot

    tokens = torch.load(job["tokens"])
    ones = torch.ones_like(tokens).tolist()
    rows = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": ones})
    start = time.monotonic()
    oneshot(
        model=model,
        tokenizer=tokenizer_of(job),
        dataset=rows,
        recipe=modifier,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
        pipeline=pipeline,
    )
    return time.monotonic() - start


def _llmcompressor(job: Job) -> tuple[float, Weights]:
    """llm-compressor: RTN, GPTQ, and GPTQ with the MSE observer instead of min-max."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    per_group = job["group"] > 0
    observer = {"observer": "mse"} if job["tool"].endswith("-mse") else {}
    arguments = QuantizationArgs(
        num_bits=job["bits"],
        symmetric=job["symmetric"],
        strategy="group" if per_group else "channel",
        group_size=job["group"] if per_group else None,
        **observer,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    is_rtn = job["tool"].startswith("llmc-rtn")
    modifier = (QuantizationModifier if is_rtn else GPTQModifier)(
        ignore=["lm_head"], config_groups={"all": scheme}
    )
    model = load(job)
    seconds = oneshot_seconds(job, model, modifier, "datafree" if is_rtn else "sequential")
    return seconds, {n: _ct_weight(m) for n, m in _linears(model).items()}


def _ct_weight(module: Any) -> Tensor:
    """code x scale of a linear that compressed-tensors prepared."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    arguments = module.quantization_scheme.weights
    zero = getattr(module, "weight_zero_point", None)
    weight: Tensor = fake_quantize(module.weight.data, module.weight_scale.data, zero, arguments)
    return weight


def _autoround(job: Job) -> tuple[float, Weights]:
    """AutoRound with its defaults: 200 iterations of signed gradient descent for each block."""
    from auto_round import AutoRound

    tokens, model = torch.load(job["tokens"]), load(job)
    start = time.monotonic()
    rounder = AutoRound(
        model,
        tokenizer_of(job),
        bits=job["bits"],
        group_size=job["group"],
        sym=job["symmetric"],
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        dataset=[row[None] for row in tokens],
        device_map="cpu",
        batch_size=BATCH,
    )
    done, _ = rounder.quantize()
    return time.monotonic() - start, weights_of(done)


def _gptqmodel(job: Job) -> tuple[float, Weights]:
    """GPTQModel's GPTQ; the saved checkpoint is opened again with its plain torch kernel."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    tokens = torch.load(job["tokens"])
    config = QuantizeConfig(bits=job["bits"], group_size=job["group"], sym=job["symmetric"])
    model = GPTQModel.load(job["model"], config, device="cpu", dtype=torch.float32)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    start = time.monotonic()
    model.quantize(rows, batch_size=BATCH)
    seconds = time.monotonic() - start
    saved = Path(job["out"]) / "native"
    model.save(str(saved))
    opened = GPTQModel.load(str(saved), device="cpu", backend=BACKEND.TORCH).model
    found = {
        n: m.dequantize_weight().T
        for n, m in opened.named_modules()
        if hasattr(m, "dequantize_weight") and ".layers." in n
    }
    shutil.rmtree(saved)
    return seconds, found


def _hqq(job: Job) -> tuple[float, Weights]:
    """HQQ: no data; asymmetric by nature, with a real-valued zero point for each group."""
    from hqq.core.quantize import Quantizer

    if job["symmetric"]:
        raise SystemExit("HQQ has no symmetric grid")
    weights, start = weights_of(load(job)), time.monotonic()
    stored = {
        name: Quantizer.quantize(
            weight,
            nbits=job["bits"],
            group_size=job["group"] if job["group"] > 0 else None,
            axis=1,
            optimize=True,
            round_zero=False,
            device="cpu",
            compute_dtype=torch.float32,
        )
        for name, weight in weights.items()
    }
    seconds = time.monotonic() - start
    return seconds, {n: Quantizer.dequantize(*pair) for n, pair in stored.items()}


def _torchao(job: Job) -> tuple[float, Weights]:
    """torchao's weight-only integers: any width (affine or HQQ scales), or its int4 format."""
    from torchao.quantization import (
        Int4WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerAxis,
        PerGroup,
        quantize_,
    )

    model = load(job)
    if job["tool"] == "torchao-int4":
        config: Any = Int4WeightOnlyConfig(group_size=job["group"])
    else:
        hqq = job["tool"] == "torchao-hqq"
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{job['bits']}"),
            granularity=PerGroup(job["group"]) if job["group"] > 0 else PerAxis(0),
            mapping_type=MappingType.SYMMETRIC if job["symmetric"] else MappingType.ASYMMETRIC,
            intx_choose_qparams_algorithm="hqq_scale_only" if hqq else "affine",
        )
    names, start = set(_linears(model)), time.monotonic()
    quantize_(model, config, filter_fn=lambda module, name: name in names)
    seconds = time.monotonic() - start
    found = {n: m.weight for n, m in _linears(model).items() if hasattr(m.weight, "dequantize")}
    return seconds, {n: w.dequantize() for n, w in found.items()}


TOOLS: dict[str, Callable[[Job], tuple[float, Weights]]] = {
    "llmc-rtn": _llmcompressor,
    "llmc-gptq": _llmcompressor,
    "llmc-gptq-mse": _llmcompressor,
    "autoround": _autoround,
    "gptqmodel": _gptqmodel,
    "hqq": _hqq,
    "torchao-rtn": _torchao,
    "torchao-hqq": _torchao,
    "torchao-int4": _torchao,
}


if __name__ == "__main__":
    main()
