"""How keys and values are kept: as numbers of a dtype, or as codes of 8 or 4 bits.

    fp8 (e4m3), int8, int4    one float32 scale for each token and head, made of its largest
                              number when it is written; sizes with E = 128: 132, 132, 68 bytes
    fp32, bf16, fp16          the numbers themselves; 512, 256, 256 bytes

"auto" is the dtype of the model, or what the artifact's `kv_cache_scheme` asks for. Scales that an
artifact has calibrated (`k_scale`, `v_scale`, of a layer) are not used, and a note says so: with a
scale of its own a token loses less (figures: docs/serving.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compressor.errors import UnsupportedError
from compressor.serve.options import KV_CACHE_DTYPES, ServeOptions
from compressor_kernels.kv_pool import KVPool, pack, unpack
from compressor_kernels.words import Kind

_KINDS: dict[str, Kind] = {"fp8": "e4m3", "int8": "int8", "int4": "int4"}
_NUMBERS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Sizes of one layer's keys and values."""

    kv_heads: int
    key_size: int
    value_size: int


@dataclass(frozen=True, slots=True)
class KVFormat:
    """What a pool holds: codes of `kind`, or (None) numbers of `dtype`."""

    kind: Kind | None
    dtype: torch.dtype

    @classmethod
    def of(cls, name: str, dtype: torch.dtype) -> KVFormat:
        """The format of a name in `KV_CACHE_DTYPES`; "auto" is numbers of `dtype`."""
        plain = KV_CACHE_DTYPES[name]
        return cls(_KINDS.get(plain), _NUMBERS.get(plain, dtype))

    def __str__(self) -> str:
        if self.kind is None:
            return str(self.dtype).removeprefix("torch.")
        return f"{self.kind} with a scale for each token and head"

    def pools(
        self, shape: LayerShape, slots: int, device: torch.device, *, layer: int
    ) -> tuple[KVPool, KVPool]:
        """Zeroed pools of a layer's keys and values; UnsupportedError (SV33) for odd head sizes."""
        sizes = (slots, shape.kv_heads, shape.key_size), (slots, shape.kv_heads, shape.value_size)
        try:
            keys, values = (
                KVPool.empty(s, self.kind, dtype=self.dtype, device=device) for s in sizes
            )
        except ValueError as error:
            raise UnsupportedError(
                f"layer {layer}: keys and values cannot be stored in {self.kind}",
                code="SV33",
                why=str(error),
                fix="choose another --kv-cache-dtype; bf16 and fp16 take every size.",
            ) from error
        return keys, values

    def rounded(self, x: Tensor) -> Tensor:
        """Numbers [..., E] as they come back from a pool, in their dtype."""
        if self.kind is None:
            return x.to(self.dtype).to(x.dtype)
        return unpack(*pack(x, self.kind), self.kind).to(x.dtype)


def notes(options: ServeOptions, tensors: Iterable[str]) -> list[str]:
    """What a person should know about the scales that a checkpoint with these tensors stores."""
    if not any(name.endswith(".k_scale") for name in tensors):
        return []
    name = options.kv_cache_dtype
    kept = "keys and values are not rounded"
    if KV_CACHE_DTYPES[name] in _KINDS:
        kept = "each token and head gets a scale of its own, which loses less"
    return [f"calibrated scales of keys and values are not used: {kept} (kv_cache_dtype {name})"]


def resolve(options: ServeOptions, config: Mapping[str, Any]) -> ServeOptions:
    """Options whose `kv_cache_dtype` is what the artifact's config asks for, if it was "auto".

    Raises UnsupportedError (SV33) for a scheme that no pool here has.
    """
    quantization = config.get("quantization_config")
    scheme = quantization.get("kv_cache_scheme") if isinstance(quantization, Mapping) else None
    if options.kv_cache_dtype != "auto" or scheme is None:
        return options
    known = {("float", 8): "fp8", ("int", 8): "int8", ("int", 4): "int4"}
    bits, kind = scheme.get("num_bits"), scheme.get("type")
    if (kind, bits) not in known:
        raise UnsupportedError(
            f"the artifact asks for keys and values of {bits} bits of type {kind}",
            code="SV33",
            why="pools of fp8 (e4m3), int8 and int4 are known.",
            fix="name one with --kv-cache-dtype.",
        )
    return replace(options, kv_cache_dtype=known[kind, bits])
