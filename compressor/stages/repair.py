"""Repair after a failed gate: more bits for the units that harm most, and for no others.

    share_u   = swap-in KL of the unit as it is stored / sum over units        (sensitivity.py)
    wanted    = what is left of the damage when the gate would pass, with a margin

The unit with the largest share goes one candidate up (its share falls to that of the new format: by
its score where the profile has one, else to a quarter for every bit), until the shares add up to
`wanted`. Blocks before the first raised unit are taken over as they are. Limits of a budget stay
limits. Which units are raised follows from calibration rows alone; from the evaluation text only
the verdict and its distance from the limit are used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compressor.artifact.formats import LayerFormat
from compressor.modeling.state import ModelState
from compressor.recipe import KEEP, SCHEMES, QuantizeConfig
from compressor.stages.blockwise import Rewritten
from compressor.stages.budget import SWAP_IN, present_options, swapped
from compressor.stages.candidates import Candidates, find_candidates, tied_units
from compressor.stages.context import StageContext
from compressor.stages.costs import ENDLESS, Limits, limits_of
from compressor.stages.profile import Profile, open_profile
from compressor.stages.search import Materialise
from compressor.stages.selection import Selection

MARGIN = 0.85  # aim below the limit by this much
SMALLEST_STEP = 0.02  # one round takes at most this share of the damage as its aim


class NothingToRaise(Exception):
    """No unit can get more bits: all have the widest candidate, or a limit forbids it."""


@dataclass(frozen=True, slots=True)
class Repair:
    """One round: its number, the quantized model that failed, and the gate's verdict on it."""

    round: int
    base: ModelState
    verdict: Mapping[str, Any]


def wanted_share(verdict: Mapping[str, Any]) -> float:
    """The part of the present KL at which the gate would pass, by the missed limit farthest off.

    Perplexity ratios and tail percentiles fall with the KL, disagreement with its square root. The
    unfavourable end of each interval counts, because the gate asks for it. 1 = bits cannot help.
    """
    shares = [1.0]
    for reason in verdict["reasons"]:
        if reason["status"] == "pass" or reason["metric"] == "num_tokens":
            continue
        ends = [e for e in reason["ci"] if e is not None] or [reason["value"]]
        worst = max(ends) if reason["sense"] == "<=" else min(ends)
        shares.append(_share(reason["metric"], worst, reason["limit"]))
    best = min(shares)
    return 1.0 if best >= 1.0 and len(shares) == 1 else max(MARGIN * best, SMALLEST_STEP)


def _share(metric: str, worst: float | None, limit: float) -> float:
    if worst is None:
        return 0.5
    if metric == "perplexity_ratio":
        return max(limit - 1.0, 0.0) / max(worst - 1.0, 1e-9)
    if metric == "top1_agreement":
        return float((max(1.0 - limit, 0.0) / max(1.0 - worst, 1e-9)) ** 2)
    return limit / max(worst, 1e-9)


def repair_blocks(
    config: QuantizeConfig, context: StageContext, selection: Selection, materialise: Materialise
) -> tuple[Rewritten, dict[str, Any]]:
    """Raise units and quantize again from the first one; returns facts as the search does.

    Raises:
        NothingToRaise: the round would change nothing.
    """
    repair = context.repair
    assert repair is not None, "called only in a repair round"
    present = present_formats(repair.base)
    raised = _raised(config, context, selection, present)
    changed: dict[str, LayerFormat | None] = dict(present)
    for formats in raised.formats.values():
        changed |= formats
    kept = {name: fmt for name, fmt in changed.items() if fmt is not None}
    rewritten = materialise(kept, tag="repair-", base=repair.base)
    status = repair.verdict["status"]
    shown = ", ".join(f"{unit} {step}" for unit, step in sorted(raised.steps.items())[:8])
    note = f"repair {repair.round}: the gate said {status}; raised {len(raised.steps)}: {shown}"
    return rewritten, {
        "repairs": [{"round": repair.round, "status": status, "raised": raised.steps,
                     "added_bytes": raised.added_bytes, "held_out_kl": rewritten.held_out_kl}],
        "search_notes": [note + (", ..." if len(raised.steps) > 8 else "")],
    }  # fmt: skip


def present_formats(state: ModelState) -> dict[str, LayerFormat]:
    """Formats of a quantized model by full linear name."""
    prefix = state.skeleton().blocks_name
    return {
        f"{prefix}.{position}.{linear}": LayerFormat.from_json(fmt)
        for position, ref in enumerate(state.blocks)
        for linear, fmt in ref.meta.get("formats", {}).items()
    }


@dataclass(frozen=True, slots=True)
class _Raised:
    """New formats by unit (None = dense), words for each step, and what it costs."""

    formats: dict[str, dict[str, LayerFormat | None]]
    steps: dict[str, str]
    added_bytes: int


def _raised(
    config: QuantizeConfig,
    context: StageContext,
    selection: Selection,
    present: dict[str, LayerFormat],
) -> _Raised:
    assert context.repair is not None, "called only in a repair round"
    there = tuple(t for t in selection.targets if t.name in present)
    quantized = Selection(there, (), {})
    limits = Limits(ENDLESS) if config.budget is None else limits_of(config, context, selection)
    wider = config.model_copy(update={"candidates": _ladder(config)})
    candidates = find_candidates(wider, context, quantized, limits)
    profile = open_profile(config, context)
    options = present_options(quantized, present, "present")
    scores = swapped(config, context, options, profile)
    damage = {unit: row["present"] for unit, row in scores.items()}
    total = math.fsum(damage.values())
    aim = wanted_share(context.repair.verdict) * total
    ladder = _Ladders(candidates, limits, tied_units(config, candidates), profile, present)
    while math.fsum(damage.values()) > aim:
        unit = next(
            (u for u in sorted(damage, key=lambda u: (-damage[u], u)) if ladder.may_rise(u)), None
        )
        if unit is None:
            break
        damage |= ladder.rise(unit, damage)
    if not ladder.place or context.repair.verdict["status"] in ("pass", "none"):
        raise NothingToRaise
    return ladder.outcome()


def _ladder(config: QuantizeConfig) -> list[str]:
    """Labels that units may climb: the recipe's candidates, or all widths of the one scheme."""
    if config.budget is not None:
        return list(config.candidates)
    suffix = "" if config.preset.symmetric else "_ASYM"
    return [label for label in SCHEMES if label in {f"W{b}A16{suffix}" for b in range(2, 9)}] + [
        KEEP
    ]


class _Ladders:
    """The candidates above each unit's present format, and how far the unit has climbed."""

    def __init__(
        self,
        candidates: Candidates,
        limits: Limits,
        tied: set[str],
        profile: Profile,
        present: dict[str, LayerFormat],
    ) -> None:
        self.candidates, self.limits, self.tied, self.profile = candidates, limits, tied, profile
        self.now: dict[str, int] = {}
        self.names: dict[str, str] = {}
        self.place: dict[str, str] = {}
        for unit, targets in candidates.targets.items():
            self.now[unit] = sum(present[t.name].packed_bytes(t.shape) for t in targets)
            self.names[unit] = present[targets[0].name].label
        self.spent = sum(self.now.values())
        self.first = self.spent

    def next_label(self, unit: str) -> str | None:
        """The next candidate by bytes."""
        above = sorted(
            (cost, label)
            for (owner, label), cost in self.candidates.cost.items()
            if owner == unit and cost > self.now[unit]
        )
        return above[0][1] if above else None

    def may_rise(self, unit: str) -> bool:
        """Whether the unit (with those tied to it) has a candidate above it that fits."""
        steps = {u: self.next_label(u) for u in self._together(unit)}
        if any(label is None for label in steps.values()):
            return False
        more = sum(self.candidates.cost[u, str(n)] - self.now[u] for u, n in steps.items())
        return self.spent + more <= self.limits.num_bytes and self._in_time(steps)

    def _in_time(self, steps: Mapping[str, str | None]) -> bool:
        if self.limits.milliseconds is None:
            return True
        labels = {u: self.place.get(u) or self._present_label(u) for u in self.now}
        labels |= {u: str(label) for u, label in steps.items()}
        return sum(self.candidates.others[i][0] for i in labels.items()) <= self.limits.milliseconds

    def _present_label(self, unit: str) -> str:
        costs = {n: c for (u, n), c in self.candidates.cost.items() if u == unit}
        return min(costs, key=lambda n: abs(costs[n] - self.now[unit]))

    def _together(self, unit: str) -> list[str]:
        return sorted(self.tied) if unit in self.tied else [unit]

    def rise(self, unit: str, damage: Mapping[str, float]) -> dict[str, float]:
        """Go one step up; returns the damage to expect of the units that did."""
        after = {}
        for each in self._together(unit):
            label = str(self.next_label(each))
            after[each] = self._expected(each, label, damage[each])
            cost = self.candidates.cost[each, label]
            self.spent += cost - self.now[each]
            self.now[each], self.place[each] = cost, label
        return after

    def _expected(self, unit: str, label: str, before: float) -> float:
        """The unit's score in a wider format: measured if the profile has it, else a guess."""
        option = self.candidates.options[unit, label]
        if not option.formats:
            return 0.0
        if not self.profile.missing(SWAP_IN, [option]):
            return min(self.profile.get(SWAP_IN, [option])[unit][label], before)
        weights = sum(t.shape[0] * t.shape[1] for t in self.candidates.targets[unit])
        bits = 8 * (self.candidates.cost[unit, label] - self.now[unit]) / weights
        return float(before * 4.0**-bits)

    def outcome(self) -> _Raised:
        """New formats of the raised units."""
        formats: dict[str, dict[str, LayerFormat | None]] = {}
        for unit, label in self.place.items():
            chosen = self.candidates.options[unit, label].formats
            formats[unit] = {t.name: chosen.get(t.linear) for t in self.candidates.targets[unit]}
        steps = {unit: f"{self.names[unit]} -> {label}" for unit, label in self.place.items()}
        return _Raised(formats, steps, self.spent - self.first)
