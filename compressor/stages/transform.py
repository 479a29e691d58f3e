"""Transform: the same function in other weights, which rounding harms less.

    awq, smoothquant    a scale for each channel between a source and its readers
    rotate              another basis of the residual stream and of the value heads

Both are proven block by block on tokens (`transform_proof.py`) or refused. The teacher of later
stages stays the original checkpoint.
"""

from __future__ import annotations

from dataclasses import replace

from compressor.errors import RecipeError
from compressor.recipe import TransformConfig
from compressor.stages.context import StageContext, StageReport
from compressor.stages.transform_rotation import rotate_model
from compressor.stages.transform_scaling import scale_model


def apply(config: TransformConfig, context: StageContext) -> StageReport:
    """Transform all blocks of a dense model.

    Raises:
        RecipeError: the model is quantized already, or nothing was calibrated (RC17).
        UnsupportedError: the architecture does not allow it (CK26).
        NumericError: activations or new weights are not finite.
    """
    if any(ref.meta.get("formats") for ref in context.state.blocks):
        raise RecipeError(
            "the model is quantized already: what is rounded can be neither scaled nor rotated",
            code="RC17", where=config.where("kind"), fix="move transform before quantize",
        )  # fmt: skip
    if config.method == "rotate":
        report = rotate_model(config, context)
    elif context.tokens is None:
        raise RecipeError(
            f"{config.method} needs a calibrate stage before it",
            code="RC17", where=config.where("method"), fix="add `- kind: calibrate`",
        )  # fmt: skip
    else:
        report = scale_model(config, context)
    cost = f"rounding the transformed weights: KL {report.facts['rounding_kl']:.1e} nats a token"
    notes = [*report.facts["notes"], cost]
    return replace(report, facts=report.facts | {"method": config.method, "notes": notes})
