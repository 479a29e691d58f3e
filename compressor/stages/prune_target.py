"""One budget for the architecture and the bits: fewer blocks, narrower layers, or smaller numbers?

    minimise    KL(shape) + sum over units KL(unit in its format)
    shape       k blocks dropped (in the greedy order), MLP channels and KV groups that stay
    subject to  parameters, bytes of all weights, milliseconds a token

Ordinary Hugging Face models have one width for all blocks, so the shape is a handful of integers:
the program is solved exactly by solving its rest, the knapsack of formats, for each shape. Every
dropped-blocks model (mended) and every width is made once and measured on held-out rows; formats
have the swap-in scores of the whole model. Sums of KLs are predictions only: the best `trials`
shapes, and the whole model with bits alone, are made with their bits and measured, and the best
one is kept. Its shape is the result; the bits are left to the quantize stage that follows, so that
a distill stage may come between.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from compressor.errors import RecipeError
from compressor.modeling.state import BlockRef, ModelState
from compressor.recipe import PruneConfig, PruneTarget, QuantizeConfig
from compressor.stages.budget import allocate_together, choices_of, scores_of
from compressor.stages.candidates import Candidates, Labels, find_candidates, tied_units
from compressor.stages.context import StageContext, StageReport
from compressor.stages.costs import limits_of, stored_tensors
from compressor.stages.depth_repair import repair_depth
from compressor.stages.held_out import HeldOut
from compressor.stages.profile import keep, open_profile
from compressor.stages.prune_depth import keep_layers, ranked
from compressor.stages.prune_width import narrowed, new_shape
from compressor.stages.quantize import materialise
from compressor.stages.selection import select
from compressor.stages.sensitivity import Scores


@dataclass(frozen=True, slots=True)
class Depth:
    """A model with some blocks dropped, and its KL on held-out rows."""

    kept: list[int]
    state: ModelState
    kl: float


@dataclass(frozen=True, slots=True)
class Plan:
    """A shape with the best formats for it: `width` is a prune stage of its own, None = full."""

    depth: Depth
    width: PruneConfig | None
    parameters: int
    predicted: float
    candidates: Candidates | None
    labels: Labels

    @property
    def name(self) -> str:
        """For the report and the units."""
        return f"keep{len(self.depth.kept)}{_width_name(self.width)}"

    @property
    def row(self) -> dict[str, Any]:
        """What the report says before anything is measured."""
        size = self.candidates.num_bytes(self.labels) if self.candidates else None
        row = {"shape": self.name, "blocks": self.depth.kept, "parameters": self.parameters}
        return row | {"predicted_kl": self.predicted, "linear_bytes": size, "formats": self.labels}


def prune_to_target(config: PruneConfig, context: StageContext) -> StageReport:
    """Choose and make a shape that keeps to the budget.

    Raises:
        RecipeError: no shape keeps to it, whatever its formats (NU12).
        UnsupportedError: blocks that can neither be dropped nor narrowed (CK26).
    """
    if not context.run.is_done("chosen"):
        search = _Search(config, context)
        best, facts = search.run()
        units = [None if ref.file is None else ref.file.stem for ref in best.blocks]
        meta = {"config": best.config, "units": units, "indices": [r.index for r in best.blocks]}
        context.run.commit_meta("chosen", meta | {"facts": facts})
        used = {ref.file for ref in best.blocks}
        for file in context.run.path.glob("*block-*.safetensors"):
            if file not in used:
                file.unlink()
    found = context.run.meta("chosen")
    return StageReport(_rebuilt(context, found), found["facts"])


def _rebuilt(context: StageContext, found: dict[str, Any]) -> ModelState:
    before = {ref.index: ref for ref in context.state.blocks}
    blocks = tuple(
        before[index]
        if unit is None
        else BlockRef(index, context.run.file(unit), context.run.meta(unit))
        for index, unit in zip(found["indices"], found["units"], strict=True)
    )
    return replace(context.state, config=found["config"], blocks=blocks)


class _Search:
    """All shapes, their predictions, and what was measured."""

    def __init__(self, config: PruneConfig, context: StageContext) -> None:
        assert config.target is not None, "called for a target"
        self.config, self.context = config, context
        self.target: PruneTarget = config.target
        self.quantize: QuantizeConfig | None = config.target.quantize
        self.held_out = HeldOut(context)
        self.notes: list[str] = []

    def run(self) -> tuple[ModelState, dict[str, Any]]:
        """The best shape's dense model, and the facts."""
        plans = sorted(self._plans(), key=lambda p: p.predicted)
        if not plans:
            raise RecipeError(
                "no shape keeps to the target, whatever its formats",
                code="NU12",
                where=self.config.where("target"),
                fix="raise the target, allow smaller candidates, widths or more dropped blocks",
            )
        chosen = plans[: self.target.trials]
        total = len(self.context.state.blocks)
        whole = [p for p in plans if len(p.depth.kept) == total and p.width is None]
        chosen += [p for p in whole if p not in chosen]
        states, rows = {}, []
        for plan in chosen:
            states[plan.name], kl = self._make(plan)
            rows.append({**plan.row, "measured_kl": kl})
        best = min(rows, key=lambda row: float(row["measured_kl"]))
        told, kl = f"{best['shape']} of {len(plans)} shapes", best["measured_kl"]
        self.notes.append(f"{told}: KL {kl:.4f} on held-out rows")
        alone = [row["measured_kl"] for row in rows if whole and row["shape"] == whole[0].name]
        if alone and best["measured_kl"] == alone[0]:
            self.notes.append("the whole model with smaller numbers is better: nothing is pruned")
        facts = {"linears": {}, "shapes": rows, "chosen": best["shape"], "notes": self.notes}
        facts |= {"bits_alone_kl": alone[0] if alone else None, "num_shapes": len(plans)}
        return states[best["shape"]], facts | {"held_out_kl": best["measured_kl"]}

    def _plans(self) -> Iterator[Plan]:
        """Every shape that can keep to the target, with its best formats."""
        scores = self._scores()
        depths, widths = list(self._depths()), list(self._widths())
        for depth, (width, kl) in itertools.product(depths, widths):
            shape = depth.state
            if width is not None:
                shape = replace(shape, config=new_shape(width, shape)[2])
            parameters = sum(count for count, _ in stored_tensors(shape))
            if parameters > self._most_parameters():
                continue
            fitted = self._formats(shape, scores)
            if fitted is not None:
                candidates, labels, damage = fitted
                predicted = depth.kl + kl + damage
                yield Plan(depth, width, parameters, predicted, candidates, labels)

    def _most_parameters(self) -> float:
        asked = self.target.params
        if isinstance(asked, float):
            return asked * sum(count for count, _ in stored_tensors(self.context.state))
        return math.inf if asked is None else asked

    def _depths(self) -> Iterator[Depth]:
        """The whole model, then one block less each time."""
        total = len(self.context.state.blocks)
        yield Depth(list(range(total)), self.context.state, 0.0)
        count = min(total - 1, int(self.target.max_dropped * total))
        rounds = ranked(self.context, count, "kl")[1] if count else []
        for number in range(1, count + 1):
            gone = {entry["removed"] for entry in rounds[:number]}
            kept = [i for i in range(total) if i not in gone]
            state = keep_layers(self.context.state, kept)
            if self.config.reconstruct:
                tag = f"keep{len(kept)}-"
                state, _ = repair_depth(self.context, state, kept, tag=tag)
            yield Depth(kept, state, self._measured(f"keep{len(kept)}", state))

    def _widths(self) -> Iterator[tuple[PruneConfig | None, float]]:
        """Full width, then every narrower one that the architecture allows, with its KL."""
        yield None, 0.0
        options = itertools.product([None, *self.target.mlp], [None, *self.target.kv_groups])
        for mlp, groups in options:
            width = {k: v for k, v in (("mlp", mlp), ("kv_groups", groups)) if v is not None}
            if not width:
                continue
            stage = {"kind": "prune", "width": width, "reconstruct": self.config.reconstruct}
            config = PruneConfig.model_validate(stage)
            try:
                new_shape(config, self.context.state)
            except RecipeError as error:
                self.notes.append(f"no candidate: {error.message}")
                continue
            tag = f"keep{len(self.context.state.blocks)}{_width_name(config)}-"
            yield config, narrowed(config, self.context, tag=tag)[2].held_out_kl or 0.0

    def _scores(self) -> Scores:
        """KL of every unit of the whole model in every format."""
        if self.quantize is None:
            return {}
        selection = select(self.quantize, self.context.state.skeleton())
        limits = limits_of(self.quantize, self.context, selection)
        candidates = find_candidates(self.quantize, self.context, selection, limits)
        profile = open_profile(self.quantize, self.context)
        scores, _ = scores_of(self.quantize, self.context, candidates, profile)
        note = keep(profile, self.quantize)
        self.notes += [*candidates.notes, *([note] if note else [])]
        return scores

    def _formats(
        self, shape: ModelState, scores: Scores
    ) -> tuple[Candidates | None, Labels, float] | None:
        """The best formats for a shape and their damage; None if none keeps to the limits."""
        if self.quantize is None:
            return None, {}, 0.0
        context = replace(self.context, state=shape)
        selection = select(self.quantize, shape.skeleton())
        here = _renamed(scores, self.context.state, shape)
        try:
            limits = limits_of(self.quantize, context, selection)
            candidates = find_candidates(self.quantize, context, selection, limits)
            choices = choices_of(self.quantize, candidates, here)
            tied = tied_units(self.quantize, candidates)
            labels = allocate_together(choices, limits.num_bytes, tied=tied, limits=limits.others)
        except RecipeError as error:
            if error.code != "NU12":
                raise
            return None
        return candidates, labels, math.fsum(here[u].get(f, 0.0) for u, f in labels.items())

    def _make(self, plan: Plan) -> tuple[ModelState, float]:
        """The dense model of a shape, and the KL of the same with its bits."""
        state = plan.depth.state
        if plan.width is not None:
            context = replace(self.context, state=state)
            state = narrowed(plan.width, context, tag=f"{plan.name}-")[2].state
        stored = state
        if self.quantize is not None and plan.candidates is not None:
            context = replace(self.context, state=state)
            formats = plan.candidates.formats(plan.labels)
            stored = materialise(self.quantize, context, formats, tag=f"{plan.name}-bits-").state
        return state, self._measured(f"{plan.name}-made", stored)

    def _measured(self, name: str, state: ModelState) -> float:
        """KL on held-out rows, nats a token; journaled."""
        unit = f"{name}-held-out"
        if not self.context.run.is_done(unit):
            self.context.run.commit_meta(unit, {"kl": self.held_out.measure(state).mean})
        return float(self.context.run.meta(unit)["kl"])


def _width_name(width: PruneConfig | None) -> str:
    if width is None or width.width is None:
        return ""
    asked = width.width.model_dump(exclude_none=True)
    return "".join(f"-{key.replace('_', '')}{value:g}" for key, value in asked.items())


def _renamed(scores: Scores, whole: ModelState, shape: ModelState) -> Scores:
    """The scores of the units that a shape still has, by their names there."""
    prefix = whole.skeleton().blocks_name
    places = {ref.index: i for i, ref in enumerate(whole.blocks)}
    found: Scores = {}
    for position, ref in enumerate(shape.blocks):
        old = f"{prefix}.{places[ref.index]}."
        mine = {u: row for u, row in scores.items() if u.startswith(old)}
        found |= {f"{prefix}.{position}.{u.removeprefix(old)}": row for u, row in mine.items()}
    return found
