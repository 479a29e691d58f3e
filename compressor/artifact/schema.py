"""Layer formats to and from a checkpoint's `quantization_config` (compressed-tensors' schema).

One format for all quantized linears is written the way everybody writes it: target "Linear", every
dense linear in `ignore`. A mixture names each linear exactly, one group for each format, so that no
pattern can hit a layer it was not meant for.
"""

from __future__ import annotations

import re
from typing import Any

from compressor.artifact.formats import LayerFormat, ScaleDtype
from compressor.errors import CheckpointError, UnsupportedError, Where

FORMAT = "pack-quantized"
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
    for name, fmt in formats.items():
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
    found = {}
    for name, scale in scales.items():
        weights = _weights_of(name, config["config_groups"])
        if weights is None:
            raise CheckpointError(
                f"no config group covers {name}, whose weights are packed", code="CK21", where=where
            )
        found[name] = _parse(weights, scale, where)
    return found


def _weights_of(name: str, groups: dict[str, Any]) -> dict[str, Any] | None:
    """compressed-tensors' precedence: an exact name, then regular expressions, then the class."""
    rank: list[tuple[int, dict[str, Any]]] = []
    for group in groups.values():
        for target in group.get("targets", []):
            if target == name:
                rank.append((0, group["weights"]))
            elif target.startswith("re:") and re.match(target[3:], name):
                rank.append((1, group["weights"]))
            elif target == "Linear":
                rank.append((2, group["weights"]))
    return min(rank, key=lambda r: r[0])[1] if rank else None


def _parse(weights: dict[str, Any], scale: ScaleDtype, where: Where) -> LayerFormat:
    bits: Any = weights.get("num_bits")
    strategy = weights.get("strategy")
    is_known = weights.get("type") == "int" and strategy in ("group", "channel")
    if not is_known or bits not in range(2, 9) or weights.get("actorder") == "group":
        raise UnsupportedError(
            f"weights stored as {weights} are not supported", code="CK34", where=where
        )
    group = -1 if strategy == "channel" else int(weights["group_size"])
    return LayerFormat(bits, group, bool(weights.get("symmetric", True)), scale)
