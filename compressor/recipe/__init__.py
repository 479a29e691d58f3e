"""Recipes: strict YAML 1.2 with line numbers, typed stages, order rules, overrides, patterns."""

from compressor.recipe.base import Part
from compressor.recipe.budget import Budget
from compressor.recipe.data import DataConfig, EvaluationData
from compressor.recipe.distillation import DistillConfig, Student
from compressor.recipe.gate import Gate
from compressor.recipe.models import (
    SCHEMA_VERSION,
    STAGE_CONFIGS,
    CalibrateConfig,
    EvaluateConfig,
    ModelConfig,
    PackConfig,
    Recipe,
    StageConfig,
    VerifyConfig,
)
from compressor.recipe.order import check_order, needs_calibration
from compressor.recipe.parse import dump_recipe, load_recipe, parse_recipe, recipe_schema
from compressor.recipe.patterns import check_patterns, match_names
from compressor.recipe.presets import KEEP, SCHEMES, Preset, candidate_preset, loads
from compressor.recipe.pruning import PruneConfig, PruneTarget, Width
from compressor.recipe.quantization import QuantizeConfig
from compressor.recipe.transforms import TransformConfig
from compressor.recipe.types import parse_size

__all__ = [
    "KEEP",
    "SCHEMA_VERSION",
    "SCHEMES",
    "STAGE_CONFIGS",
    "Budget",
    "CalibrateConfig",
    "DataConfig",
    "DistillConfig",
    "EvaluateConfig",
    "EvaluationData",
    "Gate",
    "ModelConfig",
    "PackConfig",
    "Part",
    "Preset",
    "PruneConfig",
    "PruneTarget",
    "QuantizeConfig",
    "Recipe",
    "StageConfig",
    "Student",
    "TransformConfig",
    "VerifyConfig",
    "Width",
    "candidate_preset",
    "check_order",
    "check_patterns",
    "dump_recipe",
    "load_recipe",
    "loads",
    "match_names",
    "needs_calibration",
    "parse_recipe",
    "parse_size",
    "recipe_schema",
]
