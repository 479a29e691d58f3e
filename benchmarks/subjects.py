"""The models and texts of the comparison: which tokens calibrate, which ones judge.

Rows of 192 tokens. TinyStories models: one story a row from its BOS. The project's own model, whose
texts are few and long: documents joined. The calibration documents are dealt out to three seeds, so
that no two seeds share one; the evaluation text is never calibrated on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressor.data import load_texts, token_rows
from compressor.modeling.load import load_tokenizer
from compressor.recipe import DataConfig
from compressor.reference_model import base_path, text_path

NUM_SEEDS = 3
NUM_ROWS = 128
SEQ_LEN = 192


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to compress.

    Attributes:
        groups: the group sizes compared; -1 = one scale for each output channel.
        budget_groups: group sizes of our mixtures; linears that 128 does not divide take a smaller
            group there, which no other tool does.
        packing: how documents become rows, see `compressor.data`.
    """

    name: str
    model: Path
    calibration: Path
    evaluation: Path
    groups: tuple[int, ...]
    budget_groups: tuple[int, ...]
    packing: str = "rows"


def subjects(shared: Path) -> dict[str, Subject]:
    """The three models; those of others lie in a folder that is not part of the project."""
    stories = shared / "data" / "tinystories"
    texts = (stories / "calib.jsonl", stories / "eval.jsonl")
    own = (text_path("calibration"), text_path("evaluation"))
    models = shared / "models"
    return {
        s.name: s
        for s in (
            Subject("babyllama-tok361", models / "babyllama-tok361", *texts, (32,), (32, 128)),
            Subject("stories260k", models / "stories260k", *texts, (-1,), (-1,)),
            Subject("reference", base_path(), *own, (32, 128), (32, 128), "packed"),
        )
    }


@dataclass(frozen=True, slots=True)
class Tokens:
    """One token file for all tools, and the text and settings that give our pipeline the same."""

    file: Path
    data: dict[str, Any]
    digest: str


def calibration(subject: Subject, seed: int, *, work: Path) -> Tokens:
    """Documents seed, seed + 3, seed + 6, ... of the calibration text."""
    texts = list(load_texts(DataConfig(source=str(subject.calibration))))[seed::NUM_SEEDS]
    return _tokens(subject, texts, work / subject.name / f"calibration-{seed}")


def evaluation(subject: Subject, *, work: Path) -> Tokens:
    """The first rows of the held-out text."""
    texts = list(load_texts(DataConfig(source=str(subject.evaluation))))
    return _tokens(subject, texts, work / subject.name / "evaluation")


def _tokens(subject: Subject, texts: list[str], stem: Path) -> Tokens:
    stem.parent.mkdir(parents=True, exist_ok=True)
    text_file, token_file = stem.with_suffix(".jsonl"), stem.with_suffix(".pt")
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts)
    text_file.write_text(lines, encoding="utf-8")
    data = {
        "source": str(text_file),
        "num_samples": NUM_ROWS,
        "seq_len": SEQ_LEN,
        "packing": subject.packing,
    }
    config = json.loads((subject.model / "config.json").read_text(encoding="utf-8"))
    rows = token_rows(
        DataConfig.model_validate(data),
        load_tokenizer(subject.model),
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
    )
    torch.save(rows.tokens, token_file)
    return Tokens(token_file, data, rows.digest)
