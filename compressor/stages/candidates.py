"""What a mixture can be made of: units of linears, legal formats for each, and what they cost.

units      linears that must share a format (q/k/v, gate/up, the experts of a layer)
options    the recipe's candidates that every named engine can load
cost       bytes as stored; milliseconds if the budget limits them
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from compressor.artifact.formats import LayerFormat
from compressor.errors import RecipeError
from compressor.recipe import KEEP, Preset, QuantizeConfig, candidate_preset, loads
from compressor.stages.context import StageContext
from compressor.stages.costs import Limits
from compressor.stages.selection import (
    Selection,
    Target,
    dense_bytes,
    layer_format,
    scale_dtype,
    stored_dtype,
)
from compressor.stages.sensitivity import UnitOption

Labels = dict[str, str]  # a candidate's label for every unit
Key = tuple[str, str]  # unit and label


@dataclass(frozen=True, slots=True)
class Candidates:
    """Every option of every unit, with its bytes and its other costs."""

    options: dict[Key, UnitOption]
    cost: dict[Key, int]
    others: dict[Key, tuple[float, ...]]
    targets: dict[str, list[Target]]
    notes: list[str]

    @property
    def quantized(self) -> list[UnitOption]:
        """The options that change something."""
        return [o for o in self.options.values() if o.formats]

    @property
    def widest(self) -> str:
        """The label that takes most bytes."""
        totals: dict[str, int] = {}
        for (_, label), cost in self.cost.items():
            totals[label] = totals.get(label, 0) + cost
        return max(totals, key=lambda label: totals[label])

    def formats(self, labels: Labels) -> dict[str, LayerFormat]:
        """Formats by full linear name; linears that stay dense are left out."""
        return {
            t.name: self.options[unit, label].formats[t.linear]
            for unit, label in labels.items()
            for t in self.targets[unit]
            if self.options[unit, label].formats
        }

    def num_bytes(self, labels: Labels) -> int:
        """Bytes of the targeted linears."""
        return sum(self.cost[item] for item in labels.items())


def find_candidates(
    config: QuantizeConfig, context: StageContext, selection: Selection, limits: Limits
) -> Candidates:
    """All options of a stage; raises RecipeError if no candidate is legal or fits a unit."""
    dtype = scale_dtype(config, stored_dtype(context.state))
    dense = dense_bytes(context.state)
    found = Candidates({}, {}, {}, unit_targets(selection.targets), _notes(config))
    changed: set[tuple[int, int]] = set()
    group = config.preset.group_size
    legal = [(label, candidate_preset(label, group)) for label in legal_candidates(config)]
    for unit, members in found.targets.items():
        for label, preset in legal:
            formats: dict[str, LayerFormat] = {}
            if preset is not None:
                try:
                    formats = {
                        t.linear: layer_format(preset, t.shape[1], scale_dtype=dtype, config=config)
                        for t in members
                    }
                except RecipeError as error:
                    if not preset.is_fixed or config.indivisible == "error":
                        raise
                    found.notes.append(f"{label} is no candidate for {unit}: {error.message}")
                    continue
                if not preset.is_fixed:
                    wanted = preset.group_size
                    groups = {formats[t.linear].group_size: t.shape[1] for t in members}
                    changed |= {(wanted, n) for g, n in groups.items() if g != wanted}
            sizes = [
                formats[t.linear].packed_bytes(t.shape)
                if formats
                else int(t.shape[0] * t.shape[1] * dense)
                for t in members
            ]
            found.options[unit, label] = UnitOption(unit, label, members[0].position, formats)
            found.cost[unit, label] = sum(sizes)
            found.others[unit, label] = limits.times(unit, label, sizes)
    found.notes.extend(
        f"group_size {wanted} does not divide {n} inputs; a smaller one is used"
        for wanted, n in sorted(changed)
    )
    return found


def unit_targets(targets: Iterable[Target]) -> dict[str, list[Target]]:
    """Linears by unit, in the order of the model."""
    units: dict[str, list[Target]] = {}
    for target in targets:
        units.setdefault(target.unit, []).append(target)
    return units


def legal_candidates(config: QuantizeConfig) -> list[str]:
    """The candidates that every engine of the recipe can load; one label for each format.

    Raises:
        RecipeError: none is left.
    """
    group = config.preset.group_size
    first: dict[Preset | None, str] = {}
    for label in config.candidates:
        if _is_legal(label, config):
            first.setdefault(candidate_preset(label, group), label)
    legal = list(first.values())
    if not [label for label in legal if label != KEEP]:
        raise RecipeError(
            "no candidate format is legal for every engine named",
            code="RC17",
            where=config.where("candidates"),
            fix="W4A16 and W8A16 load everywhere",
        )
    return legal


def _is_legal(label: str, config: QuantizeConfig) -> bool:
    preset = candidate_preset(label, config.preset.group_size)
    return preset is None or all(loads(engine, preset) for engine in config.engines)


def _notes(config: QuantizeConfig) -> list[str]:
    illegal = [c for c in config.candidates if not _is_legal(c, config)]
    return [f"{c} is no candidate: not every engine loads it" for c in illegal]


def tied_units(config: QuantizeConfig, candidates: Candidates) -> set[str]:
    """Units that must share one format: transformers unpacks the experts of all layers alike."""
    if "transformers" not in config.engines:
        return set()
    return {unit for unit in candidates.targets if unit.endswith(".experts")}
