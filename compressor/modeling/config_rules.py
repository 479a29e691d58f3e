"""Rules a `config.json` must keep before a library builds a model from it.

Libraries trust a config: a negative layer count gives an empty model, an absurd one eats the
memory, `auto_map` runs code. So the keys that decide shapes are checked by name here, nested
configs included, and everything that would run foreign code is refused without asking.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compressor.errors import CheckpointError, UnsupportedError, Where, printable

CONFIG = "config.json"

# Largest values of the integers that decide shapes; far above every published model.
COUNTS: dict[str, int] = {
    "num_hidden_layers": 2048,
    "n_layer": 2048,
    "num_layers": 2048,
    "hidden_size": 1 << 17,
    "n_embd": 1 << 17,
    "d_model": 1 << 17,
    "intermediate_size": 1 << 20,
    "moe_intermediate_size": 1 << 20,
    "n_inner": 1 << 20,
    "shared_expert_intermediate_size": 1 << 20,
    "num_attention_heads": 4096,
    "n_head": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 23,
    "max_position_embeddings": 1 << 28,
    "n_positions": 1 << 28,
    "sliding_window": 1 << 28,
    "num_experts": 8192,
    "num_local_experts": 8192,
    "n_routed_experts": 8192,
    "num_experts_per_tok": 8192,
}
NEVER_NULL = {
    "num_hidden_layers",
    "n_layer",
    "hidden_size",
    "n_embd",
    "num_attention_heads",
    "n_head",
    "vocab_size",
}  # others fall back to the library's default
MAY_BE_ZERO = {
    "sliding_window",
    "shared_expert_intermediate_size",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "n_routed_experts",
}
POSITIVE_FLOATS = {
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_epsilon",
    "norm_eps",
    "rope_theta",
    "rotary_emb_base",
    "query_pre_attn_scalar",
}
FLAGS = {
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "use_cache",
    "use_sliding_window",
    "use_parallel_residual",
    "norm_topk_prob",
    "scale_attn_weights",
}
ATTENTION_KEYS = (
    "_attn_implementation",
    "attn_implementation",
    "_experts_implementation",
    "experts_implementation",
)
IMPLEMENTATIONS = (
    None,
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
    "grouped_mm",
    "batched_mm",
)
QUANT_METHODS = ("compressed-tensors",)

# Families whose every step is covered by tests; other causal models of transformers are tried.
TESTED = (
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
)


def check_config(config: Mapping[str, Any], *, trusted: bool = False) -> list[str]:
    """Check a parsed `config.json`; give notes for people.

    Raises:
        CheckpointError: CK28 (value), CK29 (heads), CK31 (foreign attention kernels).
        UnsupportedError: CK26 (model type), CK34 (quantization method).
    """
    for section, values in _sections(config):
        _check_implementation(section, values)
        _check_values(section, values)
        _check_heads(section, values)
    _check_quantization(config)
    return _check_model_type(config, trusted)


def _sections(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The config itself and its nested `*_config` objects, with a key prefix."""
    yield "", config
    for key, value in config.items():
        if isinstance(value, dict) and (key.endswith("_config") or key == "rope_parameters"):
            yield f"{key}.", value


def _wrong(key: str, message: str, code: str = "CK28", why: str = "") -> CheckpointError:
    return CheckpointError(
        message,
        code=code,
        where=Where(file=CONFIG, key=printable(key)),
        why=why or "A library would build a different model, or none.",
        fix="take the config.json that belongs to these weights",
    )


def _shown(value: Any) -> str:
    return f"{printable(json.dumps(value), 60)} ({type(value).__name__})"


def _check_values(section: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        name = section + key
        if isinstance(value, float) and math.isnan(value):
            raise _wrong(name, "the value is NaN")
        if key in COUNTS and section != "quantization_config.":
            _check_count(name, key, value)
        elif key in POSITIVE_FLOATS and value is not None and not _positive(value):
            raise _wrong(name, f"must be a positive number, is {_shown(value)}")
        elif key in FLAGS and not isinstance(value, bool):
            raise _wrong(name, f"must be true or false, is {_shown(value)}")


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _check_count(name: str, key: str, value: Any) -> None:
    if value is None and key not in NEVER_NULL:
        return
    per_layer = isinstance(value, list) and value and all(type(v) is int for v in value)
    if type(value) is not int and not per_layer:
        raise _wrong(name, f"must be an integer, is {_shown(value)}")
    lowest = 0 if key in MAY_BE_ZERO else 1
    for number in value if isinstance(value, list) else [value]:
        if not lowest <= number <= COUNTS[key]:
            raise _wrong(name, f"must lie in {lowest}..{COUNTS[key]}, is {_shown(number)}")


def _check_heads(section: str, values: Mapping[str, Any]) -> None:
    hidden = values.get("hidden_size", values.get("n_embd"))
    heads = values.get("num_attention_heads", values.get("n_head"))
    if type(heads) is not int:
        return
    if type(hidden) is int and values.get("head_dim") is None and hidden % heads:
        raise _wrong(
            section + "num_attention_heads",
            f"{heads} heads do not divide the hidden size {hidden}",
            "CK29",
        )
    groups = values.get("num_key_value_heads")
    if type(groups) is int and (groups > heads or heads % groups):
        raise _wrong(
            section + "num_key_value_heads",
            f"{groups} key/value heads do not divide {heads} heads",
            "CK29",
        )


def _check_implementation(section: str, values: Mapping[str, Any]) -> None:
    internal = [k for k in values if k.endswith("_implementation_internal")]
    foreign = [k for k in ATTENTION_KEYS if k in values and values[k] not in IMPLEMENTATIONS]
    for key in internal + foreign:
        raise _wrong(
            section + key,
            f"{_shown(values[key])} may not be set by a checkpoint",
            "CK31",
            "It makes the library fetch and run kernels from the hub.",
        )


def _check_quantization(config: Mapping[str, Any]) -> None:
    nested = config.get("text_config")
    inner = nested.get("quantization_config") if isinstance(nested, dict) else None
    for body in (config.get("quantization_config"), inner):
        if body is None:
            continue
        method = body.get("quant_method") if isinstance(body, dict) else body
        if method not in QUANT_METHODS:
            raise UnsupportedError(
                f"weights quantized by {printable(str(method))!r} are not supported; "
                f"supported: {', '.join(QUANT_METHODS)}",
                code="CK34",
                where=Where(file=CONFIG, key="quantization_config.quant_method"),
                why="Its tensors cannot be read as the weights they stand for.",
                fix="start from the original 16-bit checkpoint",
            )


def causal_model_types() -> set[str]:
    """Every model_type for which the installed transformers has a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _check_model_type(config: Mapping[str, Any], trusted: bool) -> list[str]:
    kind = config.get("model_type")
    known = causal_model_types()
    if isinstance(kind, str) and kind in known:
        tested = kind in TESTED
        return [] if tested else [f"model_type {kind} is not among the tested: {', '.join(TESTED)}"]
    if trusted and "auto_map" in config:
        return ["model_type is defined by the model's own code"]
    near = difflib.get_close_matches(str(kind), sorted(known), n=1)
    raise UnsupportedError(
        f"model_type {printable(str(kind))!r} is not a causal language model known here"
        + (f"; the nearest is {near[0]!r}" if near else ""),
        code="CK26",
        where=Where(file=CONFIG, key="model_type"),
        why=f"Tested families: {', '.join(TESTED)}.",
        fix="take one of these families, or a transformers version that knows this one",
    )


def check_no_code(path: Path, config: Mapping[str, Any], *, trusted: bool) -> list[str]:
    """Refuse folders that want to run Python (CK30); nothing is run or asked."""
    files = sorted(f.name for f in path.iterdir() if f.suffix in (".py", ".pyc", ".so"))
    keys = [CONFIG] if "auto_map" in config else []
    keys += [
        name
        for name in (
            "tokenizer_config.json",
            "processor_config.json",
            "generation_config.json",
            "preprocessor_config.json",
        )
        if _mentions_auto_map(path / name)
    ]
    found = files + [f"auto_map in {name}" for name in keys]
    if not found:
        return []
    listed = ", ".join(printable(f) for f in found[:8])
    if trusted:
        return [f"the folder brings its own code, trusted by request: {listed}"]
    raise CheckpointError(
        f"this repo wants to run code: {listed}",
        code="CK30",
        where=Where(file=found[0] if files else keys[0], key="auto_map" if not files else ""),
        why="Code from a checkpoint could do anything on this machine. None was run.",
        fix="remove these files if the model type is known without them, or set "
        "model.trust_remote_code: true after reading them",
    )


def _mentions_auto_map(file: Path) -> bool:
    if not file.is_file() or file.stat().st_size > 1 << 26:
        return False
    try:
        body = json.loads(file.read_bytes())
    except (ValueError, RecursionError, OSError):
        return False
    return isinstance(body, dict) and "auto_map" in body
