"""The report: one small offline page, nothing of the machine in it, hostile names harmless."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from compressor_eval.report import ReportData, write_report

HOSTILE = "</svg><script>alert(1)</script>\"'><img src=x onerror=alert(2)>$x^2$\u202e"


def ci(value: float) -> list[float]:
    return [value * 0.93, value * 1.08]


def example(**changes: Any) -> ReportData:
    """A full report with figures as a run gives them."""
    points = {
        "perplexity_ratio": 1.0312, "kl_mean": 0.0291, "kl_median": 0.0123, "kl_p90": 0.0661,
        "kl_p99": 0.241, "kl_p999": 0.72, "top1_agreement": 0.931, "delta_p_rms": 0.034,
    }  # fmt: skip
    comparison: dict[str, Any] = dict(points)
    comparison |= {f"{k}_ci": ci(v) for k, v in points.items()}
    edges = [0.0, *(10.0 ** (i / 4) for i in range(-32, 9))]
    counts = [max(0, int(9000 - 700 * abs(i - 24) ** 1.7)) for i in range(len(edges) - 1)]
    comparison |= {
        "num_tokens": 65280, "num_rows": 256, "base_perplexity": 7.412, "perplexity": 7.643,
        "kl_max": 3.91, "top1_lost": 812, "top1_won": 503,
        "kl_histogram": {"edges": edges, "counts": counts},
    }  # fmt: skip
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    layers = [
        {"layer": n, "kind": k, "bits": 8.25 if k == "v_proj" or n == 0 else 4.156}
        for n in range(8)
        for k in kinds
    ]
    values: dict[str, Any] = {
        "title": "reference-w4a16-g128", "base": "reference", "version": "0.1.0",
        "created": "2026-01-31 12:00 UTC", "tier": "good", "comparison": comparison,
        "data": "evaluation text of the reference model, 256 rows of 256 tokens, seed 0",
        "verdict": {"status": "inconclusive", "reasons": [
            {"metric": "kl_mean", "value": 0.0291, "ci": [0.0271, 0.0314], "limit": 0.06,
             "sense": "<=", "status": "pass"},
            {"metric": "task_drop:next_line_mc", "value": 0.0125, "ci": [-0.012, 0.037],
             "limit": 0.03, "sense": "<=", "status": "inconclusive"},
        ]},
        "tasks": {"next_line_mc": {
            "num_items": 400, "base_accuracy": 0.715, "accuracy": 0.7025, "delta": -0.0125,
            "delta_ci": [-0.037, 0.012], "lost": 15, "won": 10, "flips": 0.0625, "p_value": 0.42,
            "p_holm": 0.42, "recovery": 0.983, "recovery_ci": [0.95, 1.02],
            "minimum_detectable_effect": 0.035,
        }},
        "bos": {"with_bos": 7.3, "without_bos": 7.9, "rows_with_bos": 1.0, "warnings": [
            "the tokenizer does not add BOS by itself: other tools may score without it"]},
        "sizes": [
            {"component": "embeddings", "original_bytes": 8388608, "artifact_bytes": 8388608},
            {"component": "mlp", "original_bytes": 15728640, "artifact_bytes": 4128768},
            {"component": "attention", "original_bytes": 8388608, "artifact_bytes": 2621440},
            {"component": "norms", "original_bytes": 9216, "artifact_bytes": 9216},
        ],
        "layers": layers,
        "sensitivity": [
            {"unit": f"layers.{c['layer']}.{c['kind']}", "score": 0.02 / (1 + i),
             "scheme": "W8A16 g128" if i < 6 else "W4A16 g128"}
            for i, c in enumerate(layers)
        ],
        "front": {
            "points": [{"bytes": 10**6 * n, "predicted_kl": 0.4**n} for n in range(1, 9)],
            "uniform": [
                {"name": "W4A16", "bytes": 4 * 10**6, "predicted_kl": 0.03, "measured_kl": None},
                {"name": "BF16", "bytes": 16 * 10**6, "predicted_kl": 0.0, "measured_kl": 0.0},
            ],
            "measured": [{"name": "mixed", "bytes": 3 * 10**6, "measured_kl": 0.07}],
            "kept": "mixed",
        },
        "predictions": [
            {"label": "this plan", "average_bits": 4.5, "predicted_kl": 0.026,
             "measured_kl": 0.0291},
            {"label": "uniform W4A16 g64", "average_bits": 4.5, "predicted_kl": 0.041,
             "measured_kl": None},
        ],
        "samples": [{"prompt": "def binary_search(items, key):\n", "base": "    low = 0\n",
                     "model": "    low, high = 0, len(items)\n"}],
        "worst": [{"kl": 3.91, "row": 3, "position": 77, "context": "for x in items:\n    if x",
                   "true": " is", "base": " ==", "model": "\n"}] * 3,
        "stages": [
            {"stage": "calibrate", "seconds": 3.2, "units": 1},
            {"stage": "quantize", "seconds": 61.4, "units": 56, "loss_before": 0.0312,
             "loss_after": 0.0291, "peak_bytes": 812000000},
            {"stage": "pack", "seconds": 1.1, "units": 57},
        ],
        "notes": ["Only 118 of 128 calibration rows could be used."],
        "environment": {"python": "3.11.9", "torch": "2.11.0", "device": "cpu", "threads": 2},
        "command": "compress run recipes/w4a16.yaml --set seed=0",
        "recipe": "schema_version: 1\nname: reference-w4a16-g128\nmodel:\n  path: reference\n",
    }  # fmt: skip
    return ReportData(**(values | changes))


def page(tmp_path: Path, data: ReportData) -> str:
    return write_report(data, tmp_path)[0].read_text(encoding="utf-8")


class Tags(HTMLParser):
    """All tags, and all attributes that a browser might fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "xlink:href", "data", "action", "srcset"}:
                self.fetched.append(value or "")
            self.handlers += [name] if name.startswith("on") else []


def tags(text: str) -> Tags:
    parser = Tags()
    parser.feed(text)
    return parser


def test_the_page_is_small_and_has_every_section(tmp_path) -> None:
    text = page(tmp_path, example())
    assert len(text.encode()) < 1_000_000
    assert text.count("<h2>") == 12
    assert tags(text).tags.count("svg") == 6


def test_the_page_forbids_and_needs_no_requests(tmp_path) -> None:
    text = page(tmp_path, example())
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert f'content="{policy}"' in text
    found = tags(text)
    assert all(target.startswith("#") for target in found.fetched)
    assert not {"script", "link", "iframe", "img", "object"} & set(found.tags)
    assert "http:" not in text
    assert "https:" not in text
    assert not re.search(r"url\((?!#|&quot;#)", text)


def hostile(value: Any) -> Any:
    """The same data with every string (but states and senses) made hostile."""
    if isinstance(value, dict):
        return {k: v if k in {"status", "sense", "edges"} else hostile(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [hostile(v) for v in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) else value


def test_hostile_names_stay_text(tmp_path) -> None:
    names = {f: hostile(getattr(example(), f)) for f in ReportData.__dataclass_fields__}
    text = page(tmp_path, ReportData(**names))
    found = tags(text)
    assert not {"script", "img"} & set(found.tags)
    assert found.handlers == []
    assert found.tags.count("svg") == text.count("</svg>") == 6
    assert "\u202e" not in text
    assert "&lt;script&gt;" in text


def test_machine_paths_and_tokens_are_left_out_of_both_files(tmp_path) -> None:
    token = "hf_" + "aB3" * 12
    data = example(
        base="/home/alice/models/llama",
        command=f"compress run /home/alice/my/recipe.yaml --token {token}",
        recipe="model:\n  path: /mnt/disk/bob/base\noutput: C:\\Users\\carol\\out\n",
        environment={"cache": "/Users/dave", "token": token},
        samples=[{"prompt": f"my token is {token}", "base": "", "model": ""}],
    )
    for path in write_report(data, tmp_path):
        text = path.read_text(encoding="utf-8")
        for secret in (token, "alice", "bob", "carol", "dave"):
            assert secret not in text
        assert "recipe.yaml" in text
        assert "llama" in text


def test_the_same_data_gives_the_same_bytes(tmp_path) -> None:
    first = [p.read_bytes() for p in write_report(example(), tmp_path)]
    assert first == [p.read_bytes() for p in write_report(example(), tmp_path)]


def test_an_empty_report_is_still_a_page(tmp_path) -> None:
    text = page(tmp_path, ReportData(title="nothing"))
    assert "<h1>nothing</h1>" in text
    assert "<h2>" not in text


def test_the_json_holds_everything_and_no_nan(tmp_path) -> None:
    data = example(predictions=[{"label": "a", "predicted_kl": float("nan"), "measured_kl": 0.1}])
    _, path = write_report(data, tmp_path)
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert content["predictions"][0]["predicted_kl"] is None
    assert len(content["sensitivity"]) == 56


def test_a_huge_run_still_fits(tmp_path) -> None:
    kinds = [f"kind{i}" for i in range(9)]
    cells = [{"layer": n, "kind": k, "bits": 4.0} for n in range(126) for k in kinds]
    data = example(
        layers=cells,
        sensitivity=[{"unit": "u" * 300 + str(i), "score": 1.0} for i in range(2000)],
        samples=[{"prompt": "p" * 50_000, "base": "é" * 50_000, "model": "m" * 50_000}] * 50,
        stages=[{"stage": "x" * 5000, "seconds": 1.0}] * 1000,
        recipe="#" * 1_000_000,
    )
    assert len(page(tmp_path, data).encode()) <= 1_000_000


@pytest.mark.parametrize("field", ["comparison", "tasks", "verdict", "bos", "stages", "worst"])
def test_every_section_stands_alone(tmp_path, field: str) -> None:
    data = ReportData(title="one", **{field: getattr(example(), field)})
    assert page(tmp_path, data).count("<h2>") <= 2


def test_degenerate_figures_draw(tmp_path) -> None:
    zero = {"edges": [0.0, 1e-8, 1e-7], "counts": [10, 0]}
    data = example(
        comparison={"kl_histogram": zero, "kl_mean": 0.0, "num_tokens": 10},
        sensitivity=[{"unit": "only", "score": 0.0}],
        predictions=[{"label": "x", "predicted_kl": None, "measured_kl": 0.0}],
        layers=[{"layer": 0, "kind": "q", "bits": 16.0}],
        sizes=[{"component": "all", "original_bytes": 0, "artifact_bytes": 0}],
    )
    assert "<svg" in page(tmp_path, data)
