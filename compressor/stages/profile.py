"""The sensitivity profile: scores of units by format, kept so that the next budget costs nothing.

A profile belongs to a model (digest of every weight), to calibration rows (digest) and to the
settings of the quantizer; budgets, candidates and engines are free: an option that is not in the
profile is scored and added. It lies in three places: the run folder (so a killed run goes on), the
user's cache ($COMPRESSOR_CACHE, or $XDG_CACHE_HOME/compressor, or ~/.cache/compressor), or a file
that the recipe names (`budget.profile`), which must fit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compressor.artifact.formats import LayerFormat
from compressor.errors import CompressError, RecipeError
from compressor.recipe import QuantizeConfig
from compressor.run_dir import sha256_file, write_atomic
from compressor.stages.context import StageContext
from compressor.stages.sensitivity import Scores, UnitOption

log = logging.getLogger("compressor.profile")

VERSION = 1  # of the way scores are measured
# Keys of the stage that do not change the score of a unit in a format.
FREE = {
    "kind", "scheme", "bits", "group_size", "symmetric", "targets", "ignore", "protect",
    "protect_auto", "indivisible", "scale_dtype", "budget", "candidates", "scores", "engines",
    "head", "embeddings", "kv_cache",
}  # fmt: skip


def option_key(option: UnitOption) -> str:
    """A name for a label with its exact formats: "W3A16-1f0c2a9b"."""
    formats = {name: fmt.as_json() for name, fmt in sorted(option.formats.items())}
    text = json.dumps(formats, sort_keys=True)
    return f"{option.label}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def formats_key(formats: dict[str, LayerFormat]) -> str:
    """A name for the formats of a whole model."""
    text = json.dumps({n: f.as_json() for n, f in sorted(formats.items())}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(slots=True)
class Profile:
    """Scores by kind ("swap_in_kl", "output_fisher"), unit and option; measured whole models."""

    key: dict[str, str]
    path: Path
    scores: dict[str, Scores] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)

    def missing(self, kind: str, options: Iterable[UnitOption]) -> list[UnitOption]:
        """The options without a score."""
        known = self.scores.get(kind, {})
        return [o for o in options if option_key(o) not in known.get(o.unit, {})]

    def add(self, kind: str, options: Iterable[UnitOption], found: Scores) -> None:
        """Take in scores by unit and label, and save them."""
        for option in options:
            score = found.get(option.unit, {}).get(option.label)
            if score is not None:
                rows = self.scores.setdefault(kind, {}).setdefault(option.unit, {})
                rows[option_key(option)] = score
        self.save()

    def get(self, kind: str, options: Iterable[UnitOption]) -> Scores:
        """Scores by unit and label."""
        out: Scores = {}
        for option in options:
            score = self.scores[kind][option.unit][option_key(option)]
            out.setdefault(option.unit, {})[option.label] = score
        return out

    def save(self, path: Path | None = None) -> None:
        """Write it whole or not at all."""
        body = {"key": self.key, "scores": self.scores, "measured": self.measured}
        text = json.dumps(body, indent=1, sort_keys=True) + "\n"
        write_atomic(path or self.path, text.encode())


def open_profile(config: QuantizeConfig, context: StageContext) -> Profile:
    """The run's profile: what an earlier part of the run knew, else what was kept elsewhere.

    Raises:
        RecipeError: the file that the recipe names belongs to another model, data or settings.
    """
    key = profile_key(config, context)
    profile = Profile(key, context.run.path / "profile.json")
    kept = kept_path(config, key)
    for path in (profile.path, kept):
        if path is None or not path.is_file():
            continue
        if _load(profile, path):
            return profile
        if config.budget is not None and path == kept and config.budget.profile != "auto":
            raise RecipeError(
                f"the profile {path.name} is not of this model, data and settings",
                code="KI13",
                where=config.where("budget.profile"),
                why="Its scores would mislead the allocation.",
                fix="name another file, or remove this one",
            )
    return profile


def keep(profile: Profile, config: QuantizeConfig) -> str:
    """Save a finished profile where later runs look for it; returns a note if that failed."""
    path = kept_path(config, profile.key)
    if path is None:
        return ""
    try:
        profile.save(path)
    except CompressError as error:
        log.warning("the sensitivity profile was not kept: %s", error)
        return f"the sensitivity profile was not kept: {error.message}"
    return ""


def kept_path(config: QuantizeConfig, key: dict[str, str]) -> Path | None:
    """Where a profile outlives its run; None = nowhere."""
    choice = config.budget.profile if config.budget is not None else "none"
    if choice == "none":
        return None
    if choice != "auto":
        return Path(choice)
    own = {**key, "threads": str(torch.get_num_threads())}  # sums in another order differ
    text = json.dumps(own, sort_keys=True)
    return cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def cache_base() -> Path:
    """The program's cache folder."""
    own, shared = os.environ.get("COMPRESSOR_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(shared or Path.home() / ".cache") / "compressor"


def cache_folder() -> Path:
    """The folder of kept profiles."""
    return cache_base() / "profiles"


def profile_key(config: QuantizeConfig, context: StageContext) -> dict[str, str]:
    """Digests of everything that decides a score."""
    assert context.tokens is not None, "scores need calibration rows"
    settings = config.model_dump(exclude=FREE)
    data = [context.tokens.digest, list(context.tokens.tokens.shape)]
    return {
        "model": _digest(_model_identity(context)),
        "data": _digest(data),
        "settings": _digest([settings, context.seed, VERSION]),
    }


def _model_identity(context: StageContext) -> list[Any]:
    state = context.state
    files = [(ref.index, sha256_file(ref.file) if ref.file else "") for ref in state.blocks]
    outer = sha256_file(state.outer) if state.outer else ""
    return [state.checkpoint.content_digest(), state.config, files, outer]


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _load(profile: Profile, path: Path) -> bool:
    """Fill a profile from a file; False if the file is damaged or of something else."""
    try:
        body = json.loads(path.read_bytes())
        if body["key"] != profile.key:
            return False
        profile.scores = {str(k): _scores(v) for k, v in body["scores"].items()}
        profile.measured = {str(k): float(v) for k, v in body["measured"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("the sensitivity profile %s is not usable: %s", path.name, error)
        profile.scores, profile.measured = {}, {}
        return False
    return True


def _scores(rows: dict[str, dict[str, float]]) -> Scores:
    return {str(u): {str(k): float(v) for k, v in row.items()} for u, row in rows.items()}
