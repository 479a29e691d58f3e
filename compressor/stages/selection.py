"""Which linear gets which format: patterns, protection, fused groups, groups that do not divide.

Everything here works from names and shapes alone, so that a plan can be made before any weight is
read. Full names are module names of the present model ("model.layers.3.mlp.down_proj").
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers.pytorch_utils import Conv1D

from compressor.artifact.formats import GROUP_SIZES, LayerFormat, ScaleDtype, fits
from compressor.errors import RecipeError, UnsupportedError
from compressor.modeling.families import format_unit, routers, shared_experts
from compressor.modeling.linears import find_linears, linear_shape
from compressor.modeling.skeleton import Skeleton
from compressor.modeling.state import ModelState
from compressor.recipe import SCHEMES, Preset, QuantizeConfig, candidate_preset, match_names


@dataclass(frozen=True, slots=True)
class Target:
    """A linear of a decoder block: full name, block position, block-relative name, [O, I]."""

    name: str
    position: int
    linear: str
    shape: tuple[int, int]

    @property
    def unit(self) -> str:
        """Linears with the same unit must share a format."""
        prefix = self.name[: len(self.name) - len(self.linear)]
        return prefix + format_unit(self.linear)


@dataclass(frozen=True, slots=True)
class Selection:
    """The linears to quantize, those kept dense on request, and what each pattern matched."""

    targets: tuple[Target, ...]
    protected: tuple[Target, ...]
    matched: dict[str, list[str]]
    notes: tuple[str, ...] = ()


def block_linears(skeleton: Skeleton) -> list[Target]:
    """All linears of all decoder blocks, in order."""
    found = []
    for position, block in enumerate(skeleton.blocks):
        for linear, module in find_linears(block).items():
            name = f"{skeleton.blocks_name}.{position}.{linear}"
            found.append(Target(name, position, linear, linear_shape(module)))
    return found


def select(config: QuantizeConfig, skeleton: Skeleton) -> Selection:
    """Apply targets, ignore and protect patterns; a fused group is quantized whole or not at all.

    Raises:
        RecipeError: a pattern matches nothing (RC14).
        UnsupportedError: the linears are GPT-2's Conv1D, for which no portable format exists.
    """
    linears = block_linears(skeleton)
    by_name = {t.name: t for t in linears}
    names = [*by_name, "lm_head"]
    chosen = match_names(config.targets, names, where=config.where("targets"))
    optional = () if config.where("ignore").line else tuple(config.ignore)
    ignored = match_names(
        config.ignore, names, where=config.where("ignore"), optional=(*optional, "lm_head")
    )
    kept = match_names(config.protect, names, where=config.where("protect"))
    out = {n for found in (ignored, kept) for hits in found.values() for n in hits}
    routing, shared = _every_token_needs(linears, config)
    out |= routing | shared
    wanted = {n for hits in chosen.values() for n in hits} - out
    dense_units = {t.unit for t in linears if t.name not in wanted}
    targets = tuple(t for t in linears if t.unit not in dense_units)
    protected = tuple(t for t in linears if t.unit in dense_units)
    _check_types(skeleton)
    extended = [t.name for t in protected if t.name in wanted]
    notes = [f"engines fuse them with protected layers, so they stay dense too: {extended}"]
    notes = (notes if extended else []) + transformers_notes(config, targets)
    notes += [f"{len(routing)} routers stay dense"] if routing else []
    notes += [f"shared experts stay dense, {len(shared)} linears"] if shared else []
    return Selection(targets, protected, {**chosen, **ignored, **kept}, tuple(notes))


def _every_token_needs(linears: list[Target], config: QuantizeConfig) -> tuple[set[str], set[str]]:
    """Full names of routers, and of shared experts if the recipe protects them.

    Both act on every token, and are small beside the experts: a wrong choice of experts cannot be
    made good by any of them.
    """
    routing: set[str] = set()
    shared: set[str] = set()
    for position in {t.position for t in linears}:
        names = {t.linear: t.name for t in linears if t.position == position}
        routing |= {names[n] for n in routers(names)}
        shared |= {names[n] for n in shared_experts(names)}
    return routing, (shared - routing if config.protect_shared_experts else set())


def transformers_notes(config: QuantizeConfig, targets: tuple[Target, ...]) -> list[str]:
    """What transformers 5.23 with compressed-tensors 0.20 will not read (tests/test_stage_pack.py).

    Zero points: its model expects them unpacked. Experts: it reads those of all layers in the
    format of one, silently wrong if only the bits differ.
    """
    if "transformers" not in config.engines:
        return []
    labels = config.candidates if config.budget else []
    presets = [candidate_preset(label, -1) for label in labels] or [config.preset]
    notes = []
    if any(preset is not None and not preset.symmetric for preset in presets):
        notes.append(
            "transformers (5.23) cannot load asymmetric formats yet; ours and vLLM (4, 8 bit) can"
        )
    if len(presets) > 1 and any(".experts." in t.name for t in targets):
        notes.append("transformers (5.23) misreads experts whose format differs between layers")
    if any(".experts." in t.name for t in targets):
        notes += _expert_notes([preset for preset in presets if preset is not None])
    return notes


def _expert_notes(presets: list[Preset]) -> list[str]:
    """What transformers 5.23 makes of experts in the fixed formats (test_formats_artifact)."""
    known = {label: preset for label, preset in SCHEMES.items() if preset in presets}
    notes = []
    if "W8A8" in known:
        notes.append("transformers (5.23) cannot load W8A8 experts")
    for label in ("NVFP4", "NVFP4A16"):
        if label in known:
            notes.append(f"transformers (5.23) misreads {label} experts: no global scale")
    rounded = [label for label, preset in known.items() if preset.activations != "none"]
    if rounded:
        text = "does not round the inputs of experts, as other engines and we do"
        notes.append(f"transformers (5.23) {text}: {', '.join(rounded)}")
    return notes


def _check_types(skeleton: Skeleton) -> None:
    if any(isinstance(m, Conv1D) for m in find_linears(skeleton.blocks[0]).values()):
        raise UnsupportedError(
            f"{skeleton.model_type} uses Conv1D layers, which no packed checkpoint format covers",
            code="CK26",
            fix="convert the model to linear layers first; pruning and distillation do work",
        )


def layer_format(
    preset: Preset, columns: int, *, scale_dtype: ScaleDtype, config: QuantizeConfig
) -> LayerFormat:
    """The format of a linear with `columns` inputs, at most as coarse as the preset's group.

    A group size that does not divide the inputs falls back to the largest one that does (the stage
    reports it), or is refused if the recipe says `indivisible: error`.
    """
    wanted = LayerFormat.of(preset, scale_dtype)
    if fits(wanted, columns):
        return wanted
    if preset.block and config.indivisible != "error":
        return LayerFormat.of(SCHEMES["FP8_DYNAMIC"], scale_dtype)
    if config.indivisible == "error" or preset.is_fixed:
        raise RecipeError(
            f"group_size {preset.block or preset.group_size} does not divide {columns} inputs",
            code="CK29",
            where=config.where("scheme" if preset.is_fixed else "group_size"),
            fix="protect these layers, or choose a format with one scale for each output channel"
            if preset.is_fixed
            else "choose a smaller group_size, or -1 (one scale for each output channel)",
        )
    smaller = [g for g in GROUP_SIZES if 0 < g < preset.group_size and columns % g == 0]
    group = max(smaller, default=-1)
    return LayerFormat(preset.bits, group, preset.symmetric, scale_dtype)


def scale_dtype(config: QuantizeConfig, model_dtype: str) -> ScaleDtype:
    """The dtype of stored scales; "auto" is that of the checkpoint."""
    if config.scale_dtype != "auto":
        return config.scale_dtype
    known: dict[str, ScaleDtype] = {"BF16": "bfloat16", "F16": "float16"}
    return known.get(model_dtype, "float32")


def fallbacks(formats: dict[str, LayerFormat], preset: Preset) -> list[str]:
    """One line for each group size that had to be replaced."""
    changed: dict[LayerFormat, int] = {}
    for fmt in formats.values():
        if fmt.preset != preset:
            changed[fmt] = changed.get(fmt, 0) + 1
    width = preset.block or preset.group_size
    return [
        f"group_size {width} does not divide the inputs of {count} linears: they use "
        + (f"{fmt.group_size}" if fmt.group_size > 0 else "one scale for each output channel")
        for fmt, count in changed.items()
    ]


def uniform_formats(
    config: QuantizeConfig, selection: Selection, state: ModelState
) -> dict[str, LayerFormat]:
    """The preset's format for every target, by full name."""
    dtype = scale_dtype(config, stored_dtype(state))
    return {
        t.name: layer_format(config.preset, t.shape[1], scale_dtype=dtype, config=config)
        for t in selection.targets
    }


def stored_dtype(state: ModelState) -> str:
    """The dtype most of the checkpoint's bytes are in, by its safetensors name ("BF16")."""
    bytes_of: dict[str, int] = {}
    for info in state.checkpoint.tensors.values():
        bytes_of[info.dtype_name] = bytes_of.get(info.dtype_name, 0) + info.nbytes
    return max(bytes_of, key=lambda name: bytes_of[name])


def dense_bytes(state: ModelState) -> int:
    """Bytes of a weight that stays as it is."""
    return {"F32": 4, "BF16": 2, "F16": 2}.get(stored_dtype(state), 2)
