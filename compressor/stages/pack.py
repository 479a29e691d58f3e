"""Pack: gather the units into a Hugging Face checkpoint in compressed-tensors form.

The quantized linears are already in their final bytes; packing streams them, one tensor in memory
at a time, into shards, writes the configuration that explains them, and copies what belongs to a
model besides weights: tokenizer, chat template, generation settings, licence. The matching kernels
go into `kernels/`. Nothing is visible under the output's name until the run publishes it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import compressor
from compressor.artifact.formats import LayerFormat
from compressor.artifact.manifest import Manifest, write_manifest
from compressor.artifact.packing import SUFFIXES
from compressor.artifact.schema import quantization_config
from compressor.artifact.write import DTYPES, Entry, Written, write_tensors
from compressor.modeling.families import disk_name
from compressor.modeling.skeleton import Skeleton
from compressor.modeling.state import ModelState
from compressor.recipe import PackConfig, parse_size
from compressor.stages.context import StageContext, StageReport
from compressor.stages.kernels import add_kernels
from compressor.stages.selection import block_linears

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
)
LICENCES = ("LICEN", "NOTICE", "USE_POLICY", "COPYING")


@dataclass(frozen=True, slots=True)
class Contents:
    """Everything that goes into the weight files, in order, and the formats by linear."""

    entries: list[Entry]
    formats: dict[str, LayerFormat]
    masked: list[str]
    outer: dict[str, LayerFormat]


def apply(config: PackConfig, context: StageContext) -> StageReport:
    """Write the artifact into the run folder.

    Raises:
        ResourceError: the disk is full or not writable.
    """
    folder = context.artifact
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    skeleton = context.state.skeleton()
    contents = gather(context.state, skeleton)
    limit = parse_size(config.max_shard_size)
    written = write_tensors(contents.entries, folder, max_shard_bytes=limit)
    _write_config(context.state, skeleton, contents, folder)
    copied = copy_companions(context.source, folder)
    kernels = add_kernels(contents.formats, _shapes(skeleton), config.kernels_archs, folder)
    (folder / "recipe.yaml").write_text(context.recipe_text, encoding="utf-8")
    write_manifest(_manifest(context, contents, written), folder)
    facts = {
        "weight_bytes": written.total_bytes,
        "original_bytes": sum(i.nbytes for i in context.original.checkpoint.tensors.values()),
        "num_shards": len(set(written.shards.values())),
        "files": copied,
        "kernels": kernels,
        "components": components(contents.entries),
        "original_components": _original_components(context),
    }
    context.run.progress({"unit": "artifact", "index": 1, "total": 1})
    state = replace(context.state, trail=(*context.state.trail, "pack"))
    return StageReport(state, facts)


def gather(state: ModelState, skeleton: Skeleton) -> Contents:
    """List every tensor of the model with its name on disk; data is read when it is written."""
    entries: list[Entry] = []
    formats: dict[str, LayerFormat] = {}
    masked: list[str] = []
    entries += _outer_entries(state, skeleton)
    for position, ref in enumerate(state.blocks):
        prefix = f"{skeleton.blocks_name}.{position}."

        def rename(name: str, prefix: str = prefix) -> str:
            return prefix + disk_name(skeleton.model_type, name)

        if ref.file is None:
            entries += _checkpoint_entries(state, skeleton, position, rename(""))
            continue
        entries += _file_entries(ref.file, rename)
        for linear, fmt in ref.meta["formats"].items():
            stem = rename(f"{linear}.weight").removesuffix(".weight")
            formats[stem] = LayerFormat.from_json(fmt)
        masked += [rename(f"{n}.weight").removesuffix(".weight") for n in ref.meta["masked"]]
    names = {entry.name for entry in entries}
    on_disk = _outer_name(state)
    outer = {on_disk(n): fmt for n, fmt in state.outer_formats.items()}
    outer = {n: fmt for n, fmt in outer.items() if f"{n}.weight_scale" in names}
    return Contents(entries, formats, masked, outer)


def _outer_entries(state: ModelState, skeleton: Skeleton) -> list[Entry]:
    if state.outer is not None:
        return _file_entries(state.outer, _outer_name(state))
    out = []
    for name in skeleton.outer_names():
        disk = state.disk_tensor_name(name)
        out.append(_checkpoint_entry(state, disk, _outer_name(state)(name)))
    return out


def _outer_name(state: ModelState) -> Any:
    old_head = "embed_out.weight" in state.checkpoint.tensors

    def rename(name: str) -> str:
        is_head = name.partition(".")[0] == "lm_head"
        return name.replace("lm_head", "embed_out", 1) if old_head and is_head else name

    return rename


def _checkpoint_entries(
    state: ModelState, skeleton: Skeleton, position: int, prefix: str
) -> list[Entry]:
    source = f"{skeleton.blocks_name}.{state.blocks[position].index}."
    out = []
    for name in skeleton.blocks[position].state_dict():
        on_disk = disk_name(skeleton.model_type, name)
        out.append(
            _checkpoint_entry(state, state.disk_tensor_name(source + on_disk), prefix + on_disk)
        )
    return out


def _checkpoint_entry(state: ModelState, disk: str, name: str) -> Entry:
    info = state.checkpoint.tensors[disk]

    def load() -> Tensor:
        return state.checkpoint.read(disk)

    return Entry(name, info.dtype, tuple(info.shape), load)


def _file_entries(file: Path, rename: Any) -> list[Entry]:
    out = []
    with safe_open(file, framework="pt") as opened:
        for name in sorted(opened.keys()):
            part = opened.get_slice(name)
            dtype = DTYPES[part.get_dtype()]
            shape = tuple(part.get_shape())

            def load(name: str = name) -> Tensor:
                with safe_open(file, framework="pt") as again:
                    return again.get_tensor(name)  # type: ignore[no-any-return]

            out.append(Entry(rename(name), dtype, shape, load))
    return out


def _write_config(state: ModelState, skeleton: Skeleton, contents: Contents, folder: Path) -> None:
    config = {k: v for k, v in state.config.items() if k != "quantization_config"}
    cached = any(entry.name.endswith(".k_scale") for entry in contents.entries)
    if contents.formats or contents.outer or cached:
        names = [_on_disk(skeleton, t.name, t.linear) for t in block_linears(skeleton)]
        outer = dict(contents.outer)
        if "embed_out" in outer:  # loaders know the head by its present name
            outer["lm_head"] = outer["embed_out"]
        dense = [n for n in [*names, "lm_head"] if n not in contents.formats | outer]
        config["quantization_config"] = quantization_config(
            contents.formats, dense, outer=outer, kv_cache=cached
        )
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _on_disk(skeleton: Skeleton, name: str, linear: str) -> str:
    prefix = name[: len(name) - len(linear)]
    return prefix + disk_name(skeleton.model_type, f"{linear}.weight").removesuffix(".weight")


def _shapes(skeleton: Skeleton) -> dict[str, tuple[int, int]]:
    return {_on_disk(skeleton, t.name, t.linear): t.shape for t in block_linears(skeleton)}


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copy tokenizer, templates, generation settings and licence files; returns their names."""
    copied = []
    for path in sorted(source.iterdir()):
        is_licence = path.name.upper().startswith(LICENCES)
        if path.is_file() and (path.name in COPIED or is_licence):
            shutil.copyfile(path, folder / path.name)
            copied.append(path.name)
    return copied


def components(entries: list[Entry]) -> dict[str, int]:
    """Bytes by part of the model, for the report's waterfall."""
    sums: dict[str, int] = {}
    scaled = {entry.name.removesuffix("_scale") for entry in entries}
    for entry in entries:
        is_codes = entry.name in scaled and entry.dtype.itemsize == 1  # int8 and fp8 weights
        part = "codes" if is_codes else _component(entry.name)
        sums[part] = sums.get(part, 0) + entry.nbytes
    return sums


def _original_components(context: StageContext) -> dict[str, int]:
    sums: dict[str, int] = {}
    for name, info in context.original.checkpoint.tensors.items():
        sums[_component(name)] = sums.get(_component(name), 0) + info.nbytes
    return sums


def _component(name: str) -> str:
    if name.endswith("weight_packed"):
        return "codes"
    if name.endswith((*SUFFIXES[2:], "k_scale", "v_scale")):
        return "scales and zero points"
    if "embed" in name or name.endswith(("wte.weight", "wpe.weight")):
        return "embeddings"
    if name.startswith("lm_head"):
        return "head"
    return "dense linears and norms"


def _manifest(context: StageContext, contents: Contents, written: Written) -> Manifest:
    import transformers

    checkpoint = context.original.checkpoint
    versions = {
        "compressor": compressor.__version__,
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }
    return Manifest(
        base={"digest": checkpoint.digest, "model_type": str(checkpoint.config["model_type"])},
        recipe_sha256=hashlib.sha256(context.recipe_text.encode()).hexdigest(),
        data={} if context.tokens is None else {"calibration": context.tokens.digest},
        seed=context.seed,
        versions=versions,
        tensors=written.digests,
        formats={n: f.as_json() for n, f in (contents.formats | contents.outer).items()},
        masked=contents.masked,
    )
