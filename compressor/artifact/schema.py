"""Layer formats to and from a checkpoint's `quantization_config` (compressed-tensors' schema).

One format for all quantized linears is written the way everybody writes it: target "Linear", every
dense linear in `ignore`. A mixture names each linear exactly, one group for each format, so that no
pattern can hit a layer it was not meant for. transformers (5.23) unpacks all fused experts by the
first group that names a module exactly, so the groups of experts come first: that is right as long
as the experts of all layers share one format.

Activations are described beside the weights of a group: `dynamic: true` are rounded with scales of
the moment, `dynamic: "local"` (NVFP4) with scales of the moment under a stored global one.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from compressor.artifact.formats import LayerFormat, ScaleDtype
from compressor.errors import CheckpointError, UnsupportedError, Where
from compressor.recipe.presets import SCHEMES, Activations, Preset

FORMAT = "pack-quantized"
MIXED = "mixed-precision"
SUPPORTED = (
    FORMAT, "int-quantized", "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized",
)  # fmt: skip
_GROUP_KEYS = ("targets", "weights")
_FLOAT8 = "torch.float8_e4m3fn"
_UINT8 = "torch.uint8"
_TOKEN = {"symmetric": True, "strategy": "token", "dynamic": True}
_GROUP = {"type": "float", "symmetric": True, "strategy": "group", "dynamic": True}
_INPUTS: dict[str, dict[str, Any]] = {
    "int8": {"num_bits": 8, "type": "int", **_TOKEN},
    "fp8": {"num_bits": 8, "type": "float", **_TOKEN},
    "fp8_group": {"num_bits": 8, "group_size": 128, **_GROUP},
    "mxfp4": {"num_bits": 4, "group_size": 32, "scale_dtype": _UINT8, **_GROUP},
    "nvfp4": {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group",
        "group_size": 16,
        "dynamic": "local",
        "scale_dtype": _FLOAT8,
    },
}
# As calibrated for a cache of keys and values in fp8: one scale for each tensor of a layer.
KV_FP8: dict[str, Any] = {
    "num_bits": 8,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor",
    "dynamic": False,
}
VERSION = "0.20.0"  # of the schema: the compressed-tensors release it was written for


def quantization_config(
    formats: dict[str, LayerFormat],
    dense_linears: list[str],
    *,
    outer: dict[str, LayerFormat] | None = None,
    kv_cache: bool = False,
) -> dict[str, Any]:
    """The `quantization_config` of a model.

    Args:
        formats: format of each quantized linear by full module name.
        dense_linears: names of the linears that stay dense, the head included.
        outer: formats of the quantized head and embedding; always named exactly.
        kv_cache: scales of an fp8 cache of keys and values are stored.
    """
    by_format: dict[LayerFormat, list[str]] = {}
    for name, fmt in sorted(formats.items(), key=lambda item: ".experts." not in item[0]):
        by_format.setdefault(_without_scales(fmt), []).append(name)
    single = len(by_format) == 1
    chosen = [(fmt, ["Linear"] if single else names) for fmt, names in by_format.items()]
    chosen = _outer_groups(outer or {}) + chosen
    groups = {f"group_{i}": _group(fmt, names) for i, (fmt, names) in enumerate(chosen)}
    stored = {fmt.stored for fmt, _ in chosen}
    return {
        "quant_method": "compressed-tensors",
        "format": stored.pop() if len(stored) == 1 else MIXED if stored else FORMAT,
        "quantization_status": "compressed",
        "version": VERSION,
        "global_compression_ratio": None,
        "ignore": dense_linears,
        "kv_cache_scheme": KV_FP8 if kv_cache else None,
        "config_groups": groups,
    }


def _outer_groups(outer: dict[str, LayerFormat]) -> list[tuple[LayerFormat, list[str]]]:
    """Head and embedding; first, because transformers takes the first group that matches."""
    by_format: dict[LayerFormat, list[str]] = {}
    for name, fmt in outer.items():
        by_format.setdefault(_without_scales(fmt), []).append(name)
    return list(by_format.items())


def _without_scales(fmt: LayerFormat) -> LayerFormat:
    return replace(LayerFormat.of(fmt.preset, "float32"), plain=fmt.plain)


def _group(fmt: LayerFormat, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "weights": _weights(fmt),
        "input_activations": _INPUTS.get(fmt.activations),
        "output_activations": None,
        "format": fmt.stored,
    }


def _weights(fmt: LayerFormat) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": fmt.bits,
        "type": fmt.number,
        "symmetric": fmt.symmetric,
        "strategy": "channel" if fmt.group_size == -1 else "group",
        "group_size": None if fmt.group_size == -1 else fmt.group_size,
        "dynamic": False,
    }
    if fmt.block:
        weights |= {"strategy": "block", "block_structure": [fmt.block, fmt.block]}
    if fmt.stored == "nvfp4-pack-quantized":
        weights |= {"strategy": "tensor_group", "scale_dtype": _FLOAT8}
    if fmt.stored == "mxfp4-pack-quantized":
        weights["scale_dtype"] = _UINT8
    return weights


def read_formats(
    config: dict[str, Any], scales: dict[str, ScaleDtype], *, file: str
) -> dict[str, LayerFormat]:
    """The format of each linear that has packed tensors.

    Args:
        config: the `quantization_config`.
        scales: dtype of the stored scales of each such linear, by full module name (that of
            4-bit floats follows from the format).
        file: named in errors.

    Raises:
        UnsupportedError: another quantization method or format (CK34).
        CheckpointError: a packed linear that no group covers.
    """
    where = Where(file, key="quantization_config")
    method, kind = config.get("quant_method"), config.get("format")
    if method != "compressed-tensors" or kind not in (*SUPPORTED, MIXED):
        raise UnsupportedError(
            f"quant_method {method!r} with format {kind!r} is not supported",
            code="CK34",
            where=where,
            fix=f"supported: compressed-tensors with {', '.join(SUPPORTED)}",
        )
    groups = _groups(config.get("config_groups"), where)
    found = {}
    for name, scale in scales.items():
        group = _group_of(name, groups)
        if group is None:
            raise CheckpointError(
                f"no config group covers {name}, whose weights are packed", code="CK21", where=where
            )
        found[name] = _parse(group, scale, where)
        _check_stored(found[name], group.get("format") or kind, kind, where=where)
    return found


def _check_stored(fmt: LayerFormat, named: Any, model: Any, *, where: Where) -> None:
    """The way of storing that group and model name is the one the numbers of the group mean."""
    if named not in (fmt.stored, MIXED) or model not in (fmt.stored, MIXED):
        raise UnsupportedError(
            f"{fmt.label} weights stored as {named!r} are not supported", code="CK34", where=where
        )


def _groups(value: Any, where: Where) -> list[tuple[list[str], dict[str, Any]]]:
    """Targets and settings of each group, with their types checked; a config is foreign."""
    groups = list(value.values()) if isinstance(value, dict) else [None]
    found = []
    for group in groups:
        targets, weights = (group.get(k) if isinstance(group, dict) else None for k in _GROUP_KEYS)
        is_sound = isinstance(targets, list) and all(isinstance(t, str) for t in targets)
        if not is_sound or not isinstance(weights, dict) or not _compiles(targets or []):
            text = f"config_groups is damaged: {group!r}"
            raise CheckpointError(text, code="CK21", where=where)
        assert isinstance(group, dict), "it has weights"
        found.append((targets or [], group))
    return found


def _compiles(targets: list[str]) -> bool:
    try:
        return all(re.compile(t[3:]) for t in targets if t.startswith("re:"))
    except re.error:
        return False


def _group_of(name: str, groups: list[tuple[list[str], dict[str, Any]]]) -> dict[str, Any] | None:
    """compressed-tensors' precedence: an exact name, then regular expressions, then the class."""
    rank: list[tuple[int, dict[str, Any]]] = []
    for targets, group in groups:
        for target in targets:
            if target == name:
                rank.append((0, group))
            elif target.startswith("re:") and re.match(target[3:], name):
                rank.append((1, group))
            elif target == "Linear":
                rank.append((2, group))
    return min(rank, key=lambda r: r[0])[1] if rank else None


def _parse(group: dict[str, Any], scale: ScaleDtype, where: Where) -> LayerFormat:
    """A group's settings as a format: whatever is not one of ours, written out, is refused."""
    weights, inputs = group["weights"], group.get("input_activations")
    bits, strategy, number = (weights.get(k) for k in ("num_bits", "strategy", "type"))
    size = -1 if strategy in ("channel", "block") else weights.get("group_size")
    block = weights.get("block_structure") or [0, 0]
    activations = _activations(inputs)
    is_known = number in ("int", "float") and strategy in _STRATEGIES and activations is not None
    is_known = is_known and _is_whole(bits, 2, 8) and (size == -1 or _is_whole(size, 1, 1 << 20))
    is_known = is_known and isinstance(block, list) and len(set(block)) == 1
    if is_known and _is_whole(block[0], 0, 1 << 20) and weights.get("actorder") != "group":
        symmetric = bool(weights.get("symmetric", True))
        preset = Preset(bits, symmetric, size, number, activations or "none", block[0])
        if not preset.is_fixed or preset in SCHEMES.values():
            fmt = LayerFormat.of(preset, scale)
            is_plain = group.get("format") == "int-quantized" and not preset.is_fixed
            return replace(fmt, plain=is_plain and bits == 8 and fmt.symmetric)
    raise UnsupportedError(
        f"weights stored as {weights} with inputs {inputs} are not supported",
        code="CK34",
        where=where,
    )


def _activations(inputs: Any) -> Activations | None:
    """How inputs are rounded; None if that is not one of our ways."""
    if inputs is None:
        return "none"
    if not isinstance(inputs, dict):
        return None
    for name, known in _INPUTS.items():
        if all(inputs.get(key) == value for key, value in known.items() if key != "scale_dtype"):
            return name  # type: ignore[return-value]
    return None


_STRATEGIES = ("group", "channel", "block", "tensor_group")


def _is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most
