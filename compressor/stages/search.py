"""From predictions to a measured mixture: materialise, measure on held-out rows, keep the best.

Within limits:

    1  uniform  the best single format that fits is materialised and measured; if the mixture will
                be much better than that, so is the next wider format (once for each profile)
    2  mixed    the knapsack's allocation; the better of the two is kept
    3  trials   neighbours (one unit up, one down) with the least predicted loss, one at a time; a
                neighbour is kept only if the paired test over the held-out rows says it is better

With `max_kl` the smallest point of the predicted front is sought that holds it when measured: every
measured point corrects the prediction (prediction.py) and halves what is left of the front.

Blocks before the first one that a neighbour changes are taken over from the present best: with the
same formats behind them, solving them again would give the same bytes. Only `trials` limits the
search, no clock, so that the same recipe gives the same artifact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from compressor.artifact.formats import LayerFormat
from compressor.errors import RecipeError
from compressor.modeling.state import ModelState
from compressor.recipe import QuantizeConfig
from compressor.stages.blockwise import Rewritten
from compressor.stages.budget import Problem, make_problem
from compressor.stages.candidates import Labels
from compressor.stages.context import StageContext
from compressor.stages.costs import ENDLESS
from compressor.stages.front import front_facts
from compressor.stages.held_out import HeldOut, RowDivergence, is_better
from compressor.stages.prediction import Curve
from compressor.stages.profile import formats_key, keep
from compressor.stages.selection import Selection
from compressor.stages.solve import Formats

NEAR = 1.5  # a mixture with a sum of scores farther below the uniform one's: measure the next too
NEIGHBOURS = 64  # changes up and down that are looked at, best first
ROUNDS = 8  # materialisations for max_kl at most, besides the trials


class Materialise(Protocol):
    """Quantize into formats by full linear name; `base` lends its unchanged first blocks."""

    def __call__(
        self, formats: Formats, *, tag: str, base: ModelState | None = None
    ) -> Rewritten: ...


@dataclass(frozen=True, slots=True)
class Candidate:
    """An allocation that was materialised and measured."""

    name: str
    labels: Labels
    additive: float
    predicted: float
    rewritten: Rewritten
    rows: RowDivergence

    @property
    def kl(self) -> float:
        """Measured on the held-out rows, nats a token."""
        return self.rows.mean


@dataclass(slots=True)
class Search:
    """A problem, the means to measure, and what has been measured."""

    config: QuantizeConfig
    context: StageContext
    problem: Problem
    materialise: Materialise
    held_out: HeldOut
    curve: Curve = field(default_factory=Curve)
    found: dict[str, Candidate] = field(default_factory=dict)

    def within_limits(self) -> Candidate:
        """The best allocation found within the limits."""
        uniform = self._best_uniform()
        labels = self.problem.best()
        rival = self.measure("uniform", uniform) if uniform else None
        sums = [self.problem.additive(a) for a in (labels, uniform) if a]
        if len(sums) < 2 or sums[1] > NEAR * sums[0]:
            self._measure_above()
        best = self.measure("mixed", labels)
        if rival is not None and rival.kl < best.kl:
            best = rival
        return self._improve(best)

    def smallest(self, max_kl: float) -> Candidate:
        """The smallest allocation whose measured KL is at most `max_kl`.

        Raises:
            RecipeError: not even the largest one within the other limits holds it (NU12).
        """
        front = self.problem.front(limited=True)
        failed, held = -1, len(front)
        best: Candidate | None = None
        assert self.config.budget is not None, "called only with a budget"
        for attempt in range(ROUNDS + self.config.budget.trials):
            if held - failed <= 1 or (best and attempt > self.config.budget.trials):
                break
            place = self._next_place(front, max_kl, failed, held)
            if best is None and attempt >= ROUNDS // 2:
                place = (failed + held + 1) // 2  # the predictions do not help
            tried = self.measure(f"mixed-{place:02d}", front[place])
            if tried.kl <= max_kl:
                best, held = tried, place
            else:
                failed = place
        if best is None:
            raise self._out_of_reach(max_kl)
        return self._smaller_uniform(best, max_kl)

    def _next_place(self, front: list[Labels], max_kl: float, failed: int, held: int) -> int:
        """The smallest point between the bounds that is predicted to hold, else the largest."""
        for place in range(failed + 1, held):
            if self.curve(self.problem.additive(front[place])) <= max_kl:
                return place
        return held - 1

    def _out_of_reach(self, max_kl: float) -> RecipeError:
        least = min(candidate.kl for candidate in self.found.values())
        return RecipeError(
            f"no allocation within the limits holds max_kl {max_kl:g}: the best has {least:.4g}",
            code="NU12",
            where=self.config.where("budget.max_kl"),
            why=f"Measured on {self.held_out.num_rows} held-out rows of the calibration data.",
            fix="allow more bytes, add wider candidates (BF16 always holds), or a larger max_kl",
        )

    def _smaller_uniform(self, best: Candidate, max_kl: float) -> Candidate:
        """A uniform model with fewer bytes, if one may hold the limit and does."""
        candidates = self.problem.candidates
        most = candidates.num_bytes(best.labels)
        options = sorted(self.problem.uniform().values(), key=candidates.num_bytes)
        for labels in options:
            expected = self.curve(self.problem.additive(labels))
            if candidates.num_bytes(labels) < most and expected <= 1.25 * max_kl:
                tried = self.measure("uniform", labels)
                return tried if tried.kl <= max_kl and self.problem.fits(labels) else best
        return best

    def measure(self, name: str, labels: Labels, base: Candidate | None = None) -> Candidate:
        """Materialise an allocation and measure it; journaled."""
        additive = self.problem.additive(labels)
        predicted = self.curve(additive)
        formats = self.problem.candidates.formats(labels)
        start = base.rewritten.state if base else None
        rewritten = self.materialise(formats, tag=f"{name}-", base=start)
        unit = f"{name}-held-out"
        if not self.context.run.is_done(unit):
            rows = self.held_out.measure(rewritten.state)
            self.context.run.commit_meta(unit, {"kl": rows.kl, "tokens": rows.tokens})
        meta = self.context.run.meta(unit)
        rows = RowDivergence(tuple(meta["kl"]), tuple(meta["tokens"]))
        self.curve.add(additive, rows.mean)
        rewritten = replace(rewritten, held_out_kl=rows.mean)
        self.found[name] = Candidate(name, labels, additive, predicted, rewritten, rows)
        return self.found[name]

    def _best_uniform(self) -> Labels | None:
        """The uniform allocation that fits with the least predicted KL, then the fewest bytes."""
        fitting = [u for u in self.problem.uniform().values() if self.problem.fits(u)]
        size = self.problem.candidates.num_bytes
        return min(fitting, key=lambda u: (self.problem.additive(u), size(u)), default=None)

    def _measure_above(self) -> None:
        """Learn from the smallest uniform model that does not fit; only its KL is kept."""
        sizes = self.problem.candidates.num_bytes
        wider = [u for u in self.problem.uniform().values() if not self.problem.fits(u)]
        wider = [u for u in wider if self.problem.additive(u) > 0.0]
        if not wider:
            return
        labels = min(wider, key=sizes)
        key, profile = formats_key(self.problem.candidates.formats(labels)), self.problem.profile
        if key not in profile.measured:
            profile.measured[key] = self.measure("above", labels).kl
            profile.save()
            keep(profile, self.config)
            del self.found["above"]
        self.curve.add(self.problem.additive(labels), profile.measured[key])

    def _improve(self, best: Candidate) -> Candidate:
        """Try neighbours of the best allocation; keep those that are measurably better."""
        assert self.config.budget is not None, "called only with a budget"
        tried: list[Labels] = [c.labels for c in self.found.values()]
        for trial in range(1, self.config.budget.trials + 1):
            labels = next((n for n in self._neighbours(best.labels) if n not in tried), None)
            if labels is None:
                return best
            tried.append(labels)
            candidate = self.measure(f"trial-{trial:02d}", labels, best)
            if is_better(candidate.rows.kl, best.rows.kl):
                best = candidate
        return best

    def _neighbours(self, labels: Labels) -> Iterator[Labels]:
        """Allocations with one unit up and one down that fit, the least predicted loss first."""
        ladders = self._ladders()
        ups, downs = (self._steps(labels, ladders, direction) for direction in (1, -1))
        pairs = sorted((a[0] + b[0], a[1:], b[1:]) for a in ups for b in downs if a[1] != b[1])
        for _, up, down in pairs:
            changed = {**labels, **dict([up, down])}
            if self.problem.fits(changed):
                yield changed

    def _ladders(self) -> dict[str, list[str]]:
        """The labels that each unit may have, by rising bytes; tied units stay as they are."""
        ladders: dict[str, list[str]] = {}
        for choice in sorted(self.problem.choices, key=lambda c: (c.cost, c.option)):
            if choice.unit not in self.problem.tied:
                ladders.setdefault(choice.unit, []).append(choice.option)
        return ladders

    def _steps(
        self, labels: Labels, ladders: dict[str, list[str]], direction: int
    ) -> list[tuple[float, str, str]]:
        """(change of the score, unit, label) one step up or down, the best first."""
        steps = []
        for unit, ladder in ladders.items():
            place = ladder.index(labels[unit]) + direction
            if 0 <= place < len(ladder):
                row = self.problem.scores[unit]
                change = row.get(ladder[place], 0.0) - row.get(labels[unit], 0.0)
                steps.append((change, unit, ladder[place]))
        return sorted(steps)[:NEIGHBOURS]


def mix(
    config: QuantizeConfig, context: StageContext, selection: Selection, materialise: Materialise
) -> tuple[Rewritten, dict[str, Any]]:
    """Find, materialise and measure a mixture; returns it with the facts of the search.

    Raises:
        RecipeError: the limits cannot be kept (NU12), or no candidate is legal.
    """
    assert config.budget is not None, "called only with a budget"
    unit = "chosen"
    if context.run.is_done(unit):
        found = context.run.meta(unit)
        by_name = {n: LayerFormat.from_json(f) for n, f in found["formats"].items()}
        rewritten = materialise(by_name, tag=found["tag"])
        return replace(rewritten, held_out_kl=found["held_out_kl"]), found["facts"]
    problem = make_problem(config, context, selection)
    search = Search(config, context, problem, materialise, HeldOut(context))
    if config.budget.max_kl is None:
        best = search.within_limits()
    else:
        best = search.smallest(config.budget.max_kl)
    formats = problem.candidates.formats(best.labels)
    meta = {
        "tag": f"{best.name}-",
        "formats": {n: f.as_json() for n, f in formats.items()},
        "held_out_kl": best.kl,
        "facts": _facts(search, best),
    }
    context.run.commit_meta(unit, meta)
    _forget_others(context, f"{best.name}-")
    return best.rewritten, context.run.meta(unit)["facts"]


def _forget_others(context: StageContext, tag: str) -> None:
    """Remove the blocks of candidates that were not chosen."""
    for file in context.run.path.glob("*-block-*.safetensors"):
        if not file.name.startswith(f"{tag}block-"):
            file.unlink(missing_ok=True)


def _facts(search: Search, best: Candidate) -> dict[str, Any]:
    """For the report: the allocation, everything that was measured, and the front."""
    problem, found = search.problem, search.found
    size, limit = problem.candidates.num_bytes, problem.limits.num_bytes
    front = front_facts(problem, search.curve, list(found.items()), best.labels)
    allocation = {
        "labels": {unit: best.labels[unit] for unit in sorted(best.labels)},
        "scores": problem.scores,
        "additive": {name: c.additive for name, c in found.items()},
        "predicted": {name: c.predicted for name, c in found.items()},
        "budget_bytes": limit if limit < ENDLESS else None,
        "bytes": {name: size(c.labels) for name, c in found.items()},
        "pareto": [{"bytes": p["bytes"], "kl": p["predicted_kl"]} for p in front["points"]],
        "method": problem.method,
        "num_weights": problem.num_weights,
    }
    return {
        "allocation": allocation,
        "measured": {name: c.kl for name, c in found.items()},
        "kept": best.name,
        "front": front,
        "search_notes": [*problem.candidates.notes, *_search_notes(search, best)],
    }


def _search_notes(search: Search, best: Candidate) -> list[str]:
    trials = [n for n in search.found if n.startswith("trial")]
    if not trials:
        return []
    outcome = f"{best.name} was better" if best.name in trials else "none was better"
    return [
        f"{len(trials)} neighbours tried on {search.held_out.num_rows} held-out rows: {outcome}"
    ]
