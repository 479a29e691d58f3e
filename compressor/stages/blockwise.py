"""One pass over all blocks with two streams of activations: change, commit, feed on what is stored.

    reference stream    through the blocks of the reference model, unchanged
    compressed stream   through the units that were committed: the next block sees real inputs

At most one block is held in each of its forms. A resumed run replays the forward passes of finished
blocks from their units, so it ends with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compressor.modeling.block import Block, block_tensors, load_block
from compressor.modeling.state import BlockTensors, ModelState
from compressor.modeling.walk import Walk
from compressor.stages.context import StageContext
from compressor.stages.measure import hidden_divergence
from compressor.stages.statistics import Streams, calibration_rows

# position, reference block, stored tensors of the block to change -> new tensors, facts by linear
Rewrite = Callable[[int, Block, BlockTensors], tuple[BlockTensors, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A changed model, the facts of its linears, and its KL on held-out rows (nats a token)."""

    state: ModelState
    linears: dict[str, Any]
    held_out_kl: float | None


class Sweep:
    """The walk, the two streams and the rows of one pass."""

    def __init__(
        self, context: StageContext, *, reference: ModelState | None = None, tag: str = ""
    ) -> None:
        """Open the streams.

        Args:
            context: of the stage; needs calibration tokens.
            reference: the model whose activations are the reference; default the stage's input.
            tag: prefix of unit names, for stages that make more than one pass.
        """
        assert context.tokens is not None, "the recipe's order rules demand a calibrate stage"
        self.context = context
        self.tag = tag
        self.walk = Walk(context.state, context.tokens, context.walk_options())
        self.reference = self.walk
        if reference is not None and reference is not context.state:
            self.reference = Walk(reference, context.tokens, context.walk_options())
        self.streams = Streams(
            self.reference.open_stream(f"{tag}reference"),
            self.walk.open_stream(f"{tag}compressed"),
        )
        self.rows = calibration_rows(self.walk)

    def run(self, rewrite: Rewrite, *, shape_of: ModelState | None = None) -> Rewritten:
        """Change every block by `rewrite`.

        Args:
            rewrite: called for each block that has no unit yet.
            shape_of: the state whose configuration the changed blocks have, if it is a new one.
        """
        state = shape_of or self.context.state
        skeleton = self.walk.skeleton
        if shape_of is not None:
            skeleton = shape_of.skeleton(self.walk.device)
        facts: dict[str, Any] = {}
        for position in range(self.walk.num_blocks):
            original, meta = self._unit(position, rewrite)
            unit = self._name(position)
            state = state.with_block(position, self.context.run.file(unit), meta)
            self.reference.advance(self.streams.reference, original, position)
            del original
            if self.streams.compressed.passed != position:
                stored = load_block(skeleton, position, state.read_block(position, skeleton))
                self.walk.advance(self.streams.compressed, stored, position)
                del stored
            facts |= full_names(meta["facts"], self.walk.skeleton.blocks_name, position)
            self._progress(position, meta["facts"])
        held_out = slice(self.rows.stop, self.walk.tokens.shape[0])
        kl = hidden_divergence(self.walk, self.streams, held_out)
        self.streams.close()
        return Rewritten(state, facts, kl)

    def _unit(self, position: int, rewrite: Rewrite) -> tuple[Block, dict[str, Any]]:
        """The reference block, and the journal's meta of the changed one."""
        run, unit = self.context.run, self._name(position)
        source = self.context.state.read_block(position, self.walk.skeleton)
        theirs = source
        if self.reference is not self.walk:
            theirs = self.reference.state.read_block(position, self.reference.skeleton)
        original = load_block(self.reference.skeleton, position, theirs)
        if not run.is_done(unit):
            tensors, found = rewrite(position, original, source)
            run.commit(unit, tensors.tensors, {**tensors.meta(), "facts": found})
        return original, run.meta(unit)

    def _name(self, position: int) -> str:
        return f"{self.tag}block-{position:04d}"

    def _progress(self, position: int, facts: dict[str, Any]) -> None:
        loss = float(sum(f.get("error", 0.0) for f in facts.values()))
        event = {"unit": self._name(position), "index": position + 1, "loss": loss}
        self.context.run.progress(event | {"total": self.walk.num_blocks})


def change_blocks(
    context: StageContext, change: Callable[[int, Block], dict[str, Any]], *, tag: str = ""
) -> Rewritten:
    """One pass over all blocks that needs no activations.

    Args:
        context: of the stage.
        change: changes a block in place and returns facts by linear; called for each block that
            has no unit yet.
        tag: prefix of unit names.
    """
    state = context.state
    skeleton = state.skeleton(context.device)
    facts: dict[str, Any] = {}
    for position in range(len(state.blocks)):
        unit = f"{tag}block-{position:04d}"
        if not context.run.is_done(unit):
            source = state.read_block(position, skeleton)
            block = load_block(skeleton, position, source)
            found = change(position, block)
            tensors = block_tensors(block, source)
            context.run.commit(unit, tensors.tensors, {**tensors.meta(), "facts": found})
            del source, block, tensors
        meta = context.run.meta(unit)
        state = state.with_block(position, context.run.file(unit), meta)
        facts |= full_names(meta["facts"], skeleton.blocks_name, position)
        context.run.progress({"unit": unit, "index": position + 1, "total": len(state.blocks)})
    return Rewritten(state, facts, None)


def full_names(facts: dict[str, Any], blocks_name: str, position: int) -> dict[str, Any]:
    """Facts by full linear name instead of the block-relative one."""
    return {f"{blocks_name}.{position}.{linear}": value for linear, value in facts.items()}
