"""A small language model that ships with the package, so that everything runs offline.

`base/` and `draft/` are ordinary Hugging Face folders: an 8.1 M parameter Llama trained on the
Python standard library, and a quarter-size draft model distilled from it. `data/` holds text to
calibrate on, text to evaluate on (modules the models never saw) and multiple-choice questions.
The model cards say how they were made and how good they are; `reference/` makes them again.
"""

from pathlib import Path
from typing import Literal

_ROOT = Path(__file__).resolve().parent


def base_path() -> Path:
    """Folder of the base model."""
    return _ROOT / "base"


def draft_path() -> Path:
    """Folder of the draft model, which shares the base model's tokenizer."""
    return _ROOT / "draft"


def text_path(name: Literal["calibration", "evaluation"]) -> Path:
    """JSON-lines file with one `{"text": ...}` per line, each at most 4 KiB."""
    return _ROOT / "data" / f"{name}.jsonl"
