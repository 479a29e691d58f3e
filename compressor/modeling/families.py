"""The few facts about architectures that structure alone does not tell: one small table.

Blocks are found as the longest ModuleList of a model and linears by their type. What is left:
which linears an engine fuses into one (they must share a format), what the expert weights of
mixture-of-experts families are called on disk, and which of their linears every token depends on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Leaf names that inference engines fuse into one matrix. Same parent, same format.
FUSED: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
EXPERT = re.compile(r"^(?P<experts>.+\.experts)\.(?P<index>\d+)\.(?P<leaf>[^.]+)$")
# A router decides where tokens go (most are no linears); a shared expert sees all of them.
_ROUTER = re.compile(r"(^|\.)(gate|router|wg|shared_expert_gate)(\.|$)")
_SHARED = re.compile(r"(^|\.)(shared_experts?|shared_mlp)(\.|$)")

# Module name inside a block -> name on disk, for families whose files keep older names.
_RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "mixtral": (
        (r"^mlp\.experts\.(\d+)\.gate_proj\.", r"block_sparse_moe.experts.\1.w1."),
        (r"^mlp\.experts\.(\d+)\.down_proj\.", r"block_sparse_moe.experts.\1.w2."),
        (r"^mlp\.experts\.(\d+)\.up_proj\.", r"block_sparse_moe.experts.\1.w3."),
        (r"^mlp\.", r"block_sparse_moe."),
    ),
}


def disk_name(model_type: str, name: str) -> str:
    """The name a block-relative tensor has in the checkpoint's files."""
    for pattern, replacement in _RENAMES.get(model_type, ()):
        renamed, hits = re.subn(pattern, replacement, name)
        if hits:
            return renamed
    return name


def routers(linears: Iterable[str]) -> set[str]:
    """Those of a block's linears that route tokens; empty for a block without experts."""
    names = list(linears)
    has_experts = any(map(EXPERT.match, names))
    return {n for n in names if has_experts and _ROUTER.search(n)}


def shared_experts(linears: Iterable[str]) -> set[str]:
    """Those of a block's linears that belong to an expert which sees every token."""
    return {n for n in linears if _SHARED.search(n)}


def format_unit(linear: str) -> str:
    """The unit of one format that a block-relative linear belongs to.

    Fused siblings share a unit ("self_attn.q_proj+k_proj+v_proj"), as do all experts of a layer.
    """
    if match := EXPERT.match(linear):
        return match["experts"]
    parent, _, leaf = linear.rpartition(".")
    for group in FUSED:
        if leaf in group:
            return f"{parent}.{'+'.join(group)}" if parent else "+".join(group)
    return linear
