"""Which tensors a config asks for, and whether a checkpoint has exactly those.

transformers fills a missing tensor with random values and goes on; so the model is built on the
meta device (no memory, no values) and its names and shapes are compared with the files first.

Names in memory and names on disk can differ: transformers 5 keeps the experts of a layer in one
fused tensor `mlp.experts.gate_up_proj` [E, 2M, H] while the files hold one matrix per expert. The
library's own saving rules are run on the meta tensors, so that the names here are the saved ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch

from compressor.errors import CheckpointError, Where, printable

if TYPE_CHECKING:
    from compressor.modeling.checkpoint import Checkpoint

# Suffixes of a compressed linear layer in compressed-tensors form; `weight` is then not there.
PACKED = "_packed"
PACKED_SUFFIXES = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "weight_global_scale",
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "k_scale",
    "v_scale",
)
# Buffers that old writers saved and every loader computes anew.
DERIVED = (
    "rotary_emb.inv_freq",
    "attn.bias",
    "attn.masked_bias",
    "attention.bias",
    "attention.masked_bias",
    "position_ids",
)


@dataclass(frozen=True, slots=True)
class Expected:
    """What a config asks for.

    Attributes:
        shapes: name on disk -> shape, tied copies included.
        fused: name in memory -> shape, where it differs from the name on disk.
        ties: name of a tied copy -> name it shares its storage with.
        prefix: the base model's prefix ("model.", "transformer."), which some files leave out.
    """

    shapes: dict[str, tuple[int, ...]]
    fused: dict[str, tuple[int, ...]]
    ties: dict[str, str]
    prefix: str


def expected_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name on disk -> shape of every tensor that `config` asks for (tied copies left out)."""
    found = expected(config)
    return {name: shape for name, shape in found.shapes.items() if name not in found.ties}


def meta_model(config: Mapping[str, Any]) -> Any:
    """The transformers model of a config on the meta device: shapes, no values."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    body = {k: v for k, v in deepcopy(dict(config)).items() if k != "quantization_config"}
    try:
        settings = CONFIG_MAPPING[body["model_type"]].from_dict(body)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(settings)
    except Exception as error:  # the library raises whatever a strange config leads it to
        raise CheckpointError(
            f"no model can be built from this config ({error.__class__.__name__}: "
            f"{printable(str(error), 200)})",
            code="CK28",
            where=Where(file="config.json"),
            why="transformers refuses it.",
            fix="take the config.json of these weights",
        ) from error


def expected(config: Mapping[str, Any]) -> Expected:
    """Everything a config says about names, shapes and ties."""
    from transformers.core_model_loading import revert_weight_conversion

    model = meta_model(config)
    memory = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    saved = revert_weight_conversion(model, dict(model.state_dict()))
    shapes = {name: tuple(t.shape) for name, t in saved.items()}
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    fused = {name: shape for name, shape in memory.items() if name not in shapes}
    return Expected(shapes, fused, ties, f"{model.base_model_prefix}.")


def check_complete(
    checkpoint: Checkpoint,
    *,
    strict: bool = False,
    allow_missing: Sequence[str] = (),
    want: Expected | None = None,
) -> list[str]:
    """Compare names and shapes in the files with those the config asks for.

    Args:
        checkpoint: the opened folder.
        strict: refuse unexpected tensors (CK22).
        allow_missing: patterns of names that may be absent.
        want: `expected(checkpoint.config)`, if it is at hand.

    Returns:
        notes: unexpected tensors, ties saved twice, tensors allowed to be missing.

    Raises:
        CheckpointError: CK21 (absent), CK23 or CK29 (shape), CK22 (unexpected, when strict).
    """
    want = want or expected(checkpoint.config)
    have = _long_names(checkpoint, want)
    shapes = _as_saved(want, have)
    missing = [n for n in shapes if n not in have and not _is_packed(n, have)]
    missing = [n for n in missing if not _tied_elsewhere(n, want, have)]
    absent = [n for n in missing if not any(fnmatchcase(n, p) for p in allow_missing)]
    if absent:
        raise _absent(absent, checkpoint)
    for name, shape in shapes.items():
        if name in have:
            _check_shape(checkpoint, have[name], shape)
    notes = [f"{n}: missing, allowed by request" for n in missing if n not in absent]
    notes += _tie_notes(want, have)
    return notes + _unexpected(checkpoint, shapes, have, strict)


def _long_name(name: str, want: Expected) -> str:
    """The name with the base model's prefix, which GPT-2's files leave out."""
    if name in want.shapes or name in want.fused:
        return name
    longer = want.prefix + name
    stem = longer.rpartition(".")[0]
    known = longer in want.shapes or longer in want.fused or f"{stem}.weight" in want.shapes
    return longer if known else name


def _long_names(checkpoint: Checkpoint, want: Expected) -> dict[str, str]:
    return {_long_name(name, want): name for name in checkpoint.tensors}


def _as_saved(want: Expected, have: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """The expected shapes; experts in fused form where the files hold them so."""
    fused = {n: s for n, s in want.fused.items() if n in have}
    if not fused:
        return want.shapes
    parents = tuple({n.rpartition(".")[0] + "." for n in fused})
    return {n: s for n, s in want.shapes.items() if not n.startswith(parents)} | fused


def _is_packed(name: str, have: Mapping[str, str]) -> bool:
    return name.endswith("weight") and name + PACKED in have


def _tied_elsewhere(name: str, want: Expected, have: Mapping[str, str]) -> bool:
    """Whether a tied partner of an absent tensor is in the files."""
    pairs = list(want.ties.items())
    partners = [b for a, b in pairs if a == name] + [a for a, b in pairs if b == name]
    return any(p in have or _is_packed(p, have) for p in partners)


def _absent(absent: Sequence[str], checkpoint: Checkpoint) -> CheckpointError:
    shown = ", ".join(printable(n) for n in absent[:6])
    more = f" and {len(absent) - 6} more" if len(absent) > 6 else ""
    where = Where(file=checkpoint.index_files[0], tensor=absent[0])
    return CheckpointError(
        f"{len(absent)} tensors that the config asks for are in no file: {shown}{more}",
        code="CK21",
        where=where,
        why="A library would fill them with random values and go on.",
        fix="download the model again, or name them under model.allow_missing",
    )


def _check_shape(checkpoint: Checkpoint, name: str, want: tuple[int, ...]) -> None:
    info = checkpoint.tensors[name]
    if info.shape == want:
        return
    embedding = (
        len(want) == 2
        and info.shape[1:] == want[1:]
        and want[0] == checkpoint.config.get("vocab_size")
    )
    raise CheckpointError(
        f"the shape is {list(info.shape)}, the config asks for {list(want)}",
        code="CK29" if embedding else "CK23",
        where=Where(file=info.file, tensor=name),
        why="vocab_size and the rows of the embedding differ."
        if embedding
        else "Config and weights do not belong together.",
        fix="take the config.json that belongs to these weights",
    )


def _tie_notes(want: Expected, have: Mapping[str, str]) -> list[str]:
    return [
        f"{a} is tied to {b} and saved twice; it will be saved once"
        for a, b in want.ties.items()
        if a in have and b in have
    ]


def false_ties(checkpoint: Checkpoint, want: Expected) -> list[tuple[str, str]]:
    """Pairs of names in the files that the config ties, but whose values differ (CK35)."""
    have = _long_names(checkpoint, want)
    pairs = [(have[a], have[b]) for a, b in want.ties.items() if a in have and b in have]
    return [(a, b) for a, b in pairs if not torch.equal(checkpoint.read(a), checkpoint.read(b))]


def _unexpected(
    checkpoint: Checkpoint,
    shapes: Mapping[str, tuple[int, ...]],
    have: Mapping[str, str],
    strict: bool,
) -> list[str]:
    extra = [short for long, short in have.items() if long not in shapes and not _known(long, have)]
    if not extra:
        return []
    shown = ", ".join(printable(n) for n in extra[:6]) + (", ..." if len(extra) > 6 else "")
    message = f"{len(extra)} tensors that the config does not ask for: {shown}"
    if strict:
        raise CheckpointError(
            message,
            code="CK22",
            where=Where(file=checkpoint.tensors[extra[0]].file, tensor=extra[0]),
            why="They would be left out of everything made from this model.",
            fix="remove --strict to go on without them",
        )
    return [message]


def _known(name: str, have: Mapping[str, str]) -> bool:
    stem, _, leaf = name.rpartition(".")
    packed = leaf in PACKED_SUFFIXES and (
        f"{stem}.weight{PACKED}" in have or f"{stem}.weight_scale" in have
    )
    packed = packed or leaf in ("k_scale", "v_scale")
    return packed or name.endswith(DERIVED)
