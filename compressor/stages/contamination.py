"""Evaluation rows against everything this run calibrated or trained on (CA15)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from compressor.data import Contamination, contamination
from compressor.errors import DataError
from compressor.recipe import EvaluationData
from compressor.stages.calibrate import ROWS_UNIT, read_rows, required_tokenizer
from compressor.stages.context import StageContext


def check_contamination(
    config: EvaluationData, context: StageContext
) -> tuple[dict[str, Any], list[str]]:
    """Facts of the comparison (none without such text), and a warning if the texts overlap.

    Raises:
        DataError: more rows overlap than `max_contamination` allows (CA15).
    """
    files = seen_files(context)
    if not files:
        return {}, []
    tokenizer = required_tokenizer(context.source)
    rows = read_rows(config, context)
    seen = [text for file in files for text in _texts(load_file(file)["tokens"], tokenizer)]
    found = contamination(seen, _texts(rows.tokens, tokenizer))
    limit = config.max_contamination
    if limit is not None and found.share > limit:
        raise DataError(
            f"{found.contaminated_rows} of {found.num_rows} evaluation rows ({found.share:.1%}) "
            "stand in the text the model was calibrated or trained on",
            code="CA15",
            where=config.where("max_contamination"),
            why=f"{found.identical_rows} are identical; the recipe allows {limit:.1%}.",
            fix="evaluate on held-out text, or take the overlapping rows out of the calibration",
        )
    return found.as_json() | {"texts": [file.parent.name for file in files]}, _warning(found)


def seen_files(context: StageContext) -> list[Path]:
    """Stored token rows of the stages before this one."""
    units = context.run.path.parent
    names = [name.partition("-") for name in context.facts]
    found = [units / f"{int(n):02d}-{kind}" / f"{ROWS_UNIT}.safetensors" for n, _, kind in names]
    return [file for file in found if file.is_file()]


def _warning(found: Contamination) -> list[str]:
    if not found.contaminated_rows:
        return []
    return [
        f"{found.contaminated_rows} of {found.num_rows} evaluation rows ({found.share:.1%}) stand "
        f"in the calibration or training text, {found.identical_rows} of them letter for letter: "
        "the figures flatter (CA15)"
    ]


def _texts(tokens: Any, tokenizer: Any) -> list[str]:
    decoded: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return decoded
