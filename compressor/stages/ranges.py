"""Ranges of activations in the quantized model: inputs of NVFP4 layers, keys and values.

Two kinds of numbers are stored beside weights because no engine makes them on the fly:

    input_global_scale   2^floor(log2(448 * 6 / absmax x)) of a layer's inputs x (NVFP4); a power of
                         two, like that of the weights, and with room for up to twice the absmax
    k_scale, v_scale     absmax / 448 of keys (after the rotary embedding) and of values, one for
                         each layer, for a cache in fp8

One pass of the calibration rows through the finished blocks measures both. A block that gets such
numbers is committed as another unit; its weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compressor.algorithms.float_grid import TOP, power_of_two_scale
from compressor.errors import UnsupportedError
from compressor.modeling.block import Block, block_tensors, load_block
from compressor.modeling.families import format_unit
from compressor.modeling.state import BlockTensors, ModelState
from compressor.modeling.walk import Walk
from compressor.stages.context import StageContext
from compressor.stages.statistics import calibration_rows

TAG = "ranges-"
INPUT_SCALE = "input_global_scale"
_PROJECTIONS = ("k_proj", "qkv_proj")  # compressed-tensors' sign of a layer with a cache


def needs_input_scales(state: ModelState) -> bool:
    """Whether a block has layers that round their inputs under a global scale."""
    formats = [fmt for ref in state.blocks for fmt in ref.meta.get("formats", {}).values()]
    return any(fmt.get("activations") == "nvfp4" for fmt in formats)


def add_ranges(context: StageContext, state: ModelState, *, kv_cache: bool) -> ModelState:
    """Measure and store; gives the state whose blocks have their scales.

    Args:
        context: of the quantize stage, with calibration tokens.
        state: the quantized model.
        kv_cache: also measure keys and values.

    Raises:
        UnsupportedError: keys and values of this architecture cannot be observed.
    """
    assert context.tokens is not None, "the recipe's order rules demand a calibrate stage"
    walk = Walk(state, context.tokens, context.walk_options())
    stream = walk.open_stream(f"{TAG}stream")
    for position in range(walk.num_blocks):
        unit = _unit(state, position)
        source = state.read_block(position, walk.skeleton)
        block = load_block(walk.skeleton, position, source)
        with _Ranges(block, kv_cache=kv_cache) as ranges, torch.no_grad():
            for rows in walk.batches(calibration_rows(walk)):
                out = block.run(stream.read(rows), walk.kwargs(rows, position))
                stream.write(rows, out)
        if not context.run.is_done(unit):
            tensors = ranges.stored(block, source)
            facts = {"facts": state.blocks[position].meta.get("facts", {})}
            context.run.commit(unit, tensors.tensors, tensors.meta() | facts)
        state = state.with_block(position, context.run.file(unit), context.run.meta(unit))
    stream.close()
    return state


def _unit(state: ModelState, position: int) -> str:
    """Named after the unit whose weights it repeats: another attempt has other units."""
    file = state.blocks[position].file
    return f"{TAG}{file.stem if file is not None else f'block-{position:04d}'}"


class _Ranges:
    """Listens to one block and keeps the largest absolute values."""

    def __init__(self, block: Block, *, kv_cache: bool) -> None:
        self.inputs: dict[str, float] = {}
        self.cache: dict[str, float] = {}
        self._handles = [
            linear.register_forward_pre_hook(self._note_input(name))
            for name, linear in block.linears.items()
            if linear.format is not None and linear.format.activations == "nvfp4"
        ]
        if kv_cache:
            name, attention = _attention(block.module)
            recorder = _Recorder(self.cache, name)
            self._handles.append(
                attention.register_forward_pre_hook(_use(recorder), with_kwargs=True)
            )

    def __enter__(self) -> _Ranges:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note_input(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.inputs[name] = max(self.inputs.get(name, 0.0), float(args[0].abs().max()))

        return hook

    def stored(self, block: Block, source: BlockTensors) -> BlockTensors:
        """The block's tensors with the scales that were measured."""
        units: dict[str, float] = {}
        for name, largest in self.inputs.items():
            units[format_unit(name)] = max(units.get(format_unit(name), 0.0), largest)
        for name, linear in block.linears.items():
            if linear.format is not None and linear.format.activations == "nvfp4":
                largest = units.get(format_unit(name), 0.0)  # experts without tokens: siblings'
                linear.add_input_scale(torch.tensor([power_of_two_scale(largest, margin=1.0)]))
        tensors = block_tensors(block, source)
        scales = {n: torch.tensor([max(v, 1e-12) / TOP[8]]) for n, v in self.cache.items()}
        return replace(tensors, tensors={**tensors.tensors, **scales})


class _Recorder:
    """Stands where a cache of keys and values stood; gives back what it gets."""

    def __init__(self, found: dict[str, float], name: str) -> None:
        self.found, self.name = found, name

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Note the largest key and value."""
        for leaf, tensor in (("k_scale", keys), ("v_scale", values)):
            key = f"{self.name}.{leaf}"
            self.found[key] = max(self.found.get(key, 0.0), float(tensor.abs().max()))
        return keys, values


def _use(recorder: _Recorder) -> Callable[..., tuple[Any, dict[str, Any]]]:
    def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "past_key_values": recorder}

    return hook


def _attention(block: nn.Module) -> tuple[str, nn.Module]:
    for name, module in block.named_modules():
        is_attention = "attention" in type(module).__name__.lower()
        if is_attention and any(hasattr(module, leaf) for leaf in _PROJECTIONS):
            return name, module
    raise UnsupportedError(
        f"{type(block).__name__}: no attention layer whose cache compressed-tensors knows",
        code="CK26",
        why=f"It looks for a module with {' or '.join(_PROJECTIONS)}.",
        fix="remove kv_cache: fp8 (engines can round the cache without calibrated scales)",
    )
