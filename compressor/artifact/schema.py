"""Layer formats to and from a checkpoint's `quantization_config` (compressed-tensors' schema).

One format for all quantized linears is written the way everybody writes it: target "Linear", every
dense linear in `ignore`. A mixture names each linear exactly, one group for each format, so that no
pattern can hit a layer it was not meant for. transformers (5.23) unpacks all fused experts by the
first group that names a module exactly, so the groups of experts come first: that is right as long
as the experts of all layers share one format.
"""

from __future__ import annotations

import re
from typing import Any

from compressor.artifact.formats import LayerFormat, ScaleDtype
from compressor.errors import CheckpointError, UnsupportedError, Where

FORMAT = "pack-quantized"
_GROUP_KEYS = ("targets", "weights")
VERSION = "0.20.0"  # of the schema: the compressed-tensors release it was written for


def quantization_config(
    formats: dict[str, LayerFormat], dense_linears: list[str]
) -> dict[str, Any]:
    """The `quantization_config` of a model.

    Args:
        formats: format of each quantized linear by full module name.
        dense_linears: names of the linears that stay dense, the head included.
    """
    by_format: dict[LayerFormat, list[str]] = {}
    for name, fmt in sorted(formats.items(), key=lambda item: ".experts." not in item[0]):
        by_format.setdefault(_without_scales(fmt), []).append(name)
    single = len(by_format) == 1
    groups = {
        f"group_{i}": _group(fmt, ["Linear"] if single else names)
        for i, (fmt, names) in enumerate(by_format.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "version": VERSION,
        "global_compression_ratio": None,
        "ignore": dense_linears,
        "kv_cache_scheme": None,
        "config_groups": groups,
    }


def _without_scales(fmt: LayerFormat) -> LayerFormat:
    return LayerFormat(fmt.bits, fmt.group_size, fmt.symmetric, "float32")


def _group(fmt: LayerFormat, targets: list[str]) -> dict[str, Any]:
    channel = fmt.group_size == -1
    weights = {
        "num_bits": fmt.bits,
        "type": "int",
        "symmetric": fmt.symmetric,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else fmt.group_size,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
    }


def read_formats(
    config: dict[str, Any], scales: dict[str, ScaleDtype], *, file: str
) -> dict[str, LayerFormat]:
    """The format of each linear that has packed tensors.

    Args:
        config: the `quantization_config`.
        scales: dtype of the stored scales of each such linear, by full module name.
        file: named in errors.

    Raises:
        UnsupportedError: another quantization method or format (CK34).
        CheckpointError: a packed linear that no group covers.
    """
    where = Where(file, key="quantization_config")
    method, kind = config.get("quant_method"), config.get("format")
    if method != "compressed-tensors" or kind not in (FORMAT, "mixed-precision"):
        raise UnsupportedError(
            f"quant_method {method!r} with format {kind!r} is not supported",
            code="CK34",
            where=where,
            fix="supported: compressed-tensors, pack-quantized (integer weight-only)",
        )
    groups = _groups(config.get("config_groups"), where)
    found = {}
    for name, scale in scales.items():
        weights = _weights_of(name, groups)
        if weights is None:
            raise CheckpointError(
                f"no config group covers {name}, whose weights are packed", code="CK21", where=where
            )
        found[name] = _parse(weights, scale, where)
    return found


def _groups(value: Any, where: Where) -> list[tuple[list[str], dict[str, Any]]]:
    """Targets and weight settings of each group, with their types checked; a config is foreign."""
    groups = list(value.values()) if isinstance(value, dict) else [None]
    found = []
    for group in groups:
        targets, weights = (group.get(k) if isinstance(group, dict) else None for k in _GROUP_KEYS)
        is_sound = isinstance(targets, list) and all(isinstance(t, str) for t in targets)
        if not is_sound or not isinstance(weights, dict) or not _compiles(targets or []):
            text = f"config_groups is damaged: {group!r}"
            raise CheckpointError(text, code="CK21", where=where)
        found.append((targets or [], weights))
    return found


def _compiles(targets: list[str]) -> bool:
    try:
        return all(re.compile(t[3:]) for t in targets if t.startswith("re:"))
    except re.error:
        return False


def _weights_of(name: str, groups: list[tuple[list[str], dict[str, Any]]]) -> dict[str, Any] | None:
    """compressed-tensors' precedence: an exact name, then regular expressions, then the class."""
    rank: list[tuple[int, dict[str, Any]]] = []
    for targets, weights in groups:
        for target in targets:
            if target == name:
                rank.append((0, weights))
            elif target.startswith("re:") and re.match(target[3:], name):
                rank.append((1, weights))
            elif target == "Linear":
                rank.append((2, weights))
    return min(rank, key=lambda r: r[0])[1] if rank else None


def _parse(weights: dict[str, Any], scale: ScaleDtype, where: Where) -> LayerFormat:
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    group = -1 if strategy == "channel" else weights.get("group_size")
    is_known = weights.get("type") == "int" and strategy in ("group", "channel")
    is_known = is_known and _is_whole(bits, 2, 8) and (group == -1 or _is_whole(group, 1, 1 << 20))
    if not is_known or weights.get("actorder") == "group":
        raise UnsupportedError(
            f"weights stored as {weights} are not supported", code="CK34", where=where
        )
    symmetric = bool(weights.get("symmetric", True))
    return LayerFormat(int(bits or 0), int(group or 0), symmetric, scale)


def _is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most
