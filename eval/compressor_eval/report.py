"""report.html and report.json: everything a reader needs to trust an artifact, or to refuse it.

The page is one file of at most 1 MB that opens offline: inline SVG, no script, nothing fetched
(its content security policy forbids it). Names and texts come from models and data, so they are
escaped; access tokens and paths of the machine are redacted in both files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, Undefined
from markupsafe import Markup

from compressor.artifact.card import redact
from compressor.run_dir.log import redact as redact_secrets
from compressor_eval import charts

__all__ = ["ReportData", "redact", "write_report"]

_MAX_BYTES = 1_000_000
_MAX_ROWS = 400  # of one table or drawing's data in the page; report.json has them all
_MAX_TEXT = 4_000  # characters of one text in the page
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class ReportData:
    """Plain data (dicts, lists, numbers, strings); a section without data is left out.

    The keys of the rows are part of the interface; unknown keys of `stages` become columns.
    """

    title: str
    base: str = ""
    version: str = ""
    created: str = ""  # UTC; given by the caller, so that a report repeats byte for byte
    verdict: Mapping[str, Any] = field(default_factory=dict)  # Verdict.as_json()
    tier: str = ""
    comparison: Mapping[str, Any] = field(default_factory=dict)  # Comparison.as_json()
    bos: Mapping[str, Any] = field(default_factory=dict)  # BosProbe.as_json()
    data: str = ""  # which evaluation text: source, rows, length, digest
    tasks: Mapping[str, Any] = field(default_factory=dict)  # name -> TaskComparison.as_json()
    sizes: Rows = ()  # component, original_bytes, artifact_bytes
    layers: Rows = ()  # layer: int, kind, bits
    sensitivity: Rows = ()  # unit, score, scheme (optional)
    predictions: Rows = ()  # label, average_bits, predicted_kl, measured_kl (either may be None)
    front: Mapping[str, Any] = field(default_factory=dict)  # points, uniform, measured: rows; kept
    samples: Rows = ()  # prompt, base, model
    worst: Rows = ()  # decode_worst(): kl, row, position, context, true, base, model
    stages: Rows = ()  # stage, seconds, and whatever else a stage tells
    notes: Sequence[str] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    recipe: str = ""  # YAML


_TEXT_FIELDS = {"samples", "worst"}  # model output: secrets are blacked out, paths are left alone

# key, name, format, what it says
_SUMMARY = (
    ("perplexity_ratio", "perplexity ratio", ".4f", "1 = no loss"),
    ("base_perplexity", "perplexity, original", ".4g", ""),
    ("perplexity", "perplexity, artifact", ".4g", ""),
    ("kl_mean", "KL divergence, mean", ".5f", "nats a token; 0 = same distribution"),
    ("kl_median", "KL divergence, median", ".5f", ""),
    ("kl_p90", "KL divergence, p90", ".4f", ""),
    ("kl_p99", "KL divergence, p99", ".4f", ""),
    ("kl_p999", "KL divergence, p99.9", ".4f", "few tokens lie beyond: wide interval"),
    ("kl_max", "KL divergence, max", ".4f", "one token"),
    ("top1_agreement", "top-1 agreement", ".2%", "both models have the same first choice"),
    ("delta_p_rms", "RMS Δp of the true token", ".2%", ""),
)


def write_report(data: ReportData, out_dir: Path) -> tuple[Path, Path]:
    """Write report.html and report.json into an existing folder; the same data, the same bytes."""
    content = {f.name: _clean(getattr(data, f.name), _redactor(f.name)) for f in fields(data)}
    html_path, json_path = out_dir / "report.html", out_dir / "report.json"
    html_path.write_text(render_html(content), encoding="utf-8", newline="\n")
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    json_path.write_text(text + "\n", encoding="utf-8", newline="\n")
    return html_path, json_path


def render_html(content: Mapping[str, Any]) -> str:
    """The page; long tables and texts are shortened, more so if it would be over 1 MB."""
    drawings = _charts(content)
    for shrink in (1, 4, 16, 64):
        short = _shorten(content, _MAX_ROWS // shrink, _MAX_TEXT // shrink)
        page: str = _template().render(**short, charts=drawings, summary=_summary(content))
        if len(page.encode()) <= _MAX_BYTES:
            return page
    raise ValueError("report.html does not fit into 1 MB")


def _redactor(name: str) -> Callable[[str], str]:
    return redact_secrets if name in _TEXT_FIELDS else redact


def _clean(value: Any, hide: Callable[[str], str]) -> Any:
    """Plain JSON data, redacted: no NaN, no control or direction-changing characters."""
    if isinstance(value, Mapping):
        return {_clean(str(k), hide): _clean(v, hide) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(v, hide) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    text = str(value).encode("utf-8", "backslashreplace").decode()
    return _UNSAFE.sub(lambda c: f"\\x{ord(c[0]):02x}", hide(text))


def _shorten(value: Any, rows: int, characters: int) -> Any:
    if isinstance(value, Mapping):
        kept = list(value.items())[:rows]
        return {k[:200]: _shorten(v, rows, characters) for k, v in kept}
    if isinstance(value, list):
        return [_shorten(v, rows, characters) for v in value[:rows]]
    if isinstance(value, str) and len(value) > characters:
        return f"{value[:characters]} […]"
    return value


def _charts(content: Mapping[str, Any]) -> dict[str, Markup]:
    """The drawings whose data is there. matplotlib escapes the names it draws."""
    histogram = content["comparison"] if "kl_histogram" in content["comparison"] else None
    sources: dict[str, tuple[Callable[[Any], str], Any]] = {
        "sizes": (charts.waterfall, content["sizes"]),
        "layers": (charts.bits_heat_map, content["layers"]),
        "sensitivity": (charts.sensitivity_bars, content["sensitivity"]),
        "predictions": (charts.predictions, content["predictions"]),
        "front": (charts.front, content["front"]),
        "kl": (charts.kl_histogram, histogram),
    }
    drawn = {name: draw(rows) if rows else "" for name, (draw, rows) in sources.items()}
    return {name: Markup(svg) for name, svg in drawn.items()}


def _summary(content: Mapping[str, Any]) -> list[dict[str, str]]:
    comparison = content["comparison"]
    return [
        {
            "name": name,
            "value": _number(comparison[key], form),
            "ci": _interval(comparison.get(f"{key}_ci"), form),
            "note": note,
        }
        for key, name, form, note in _SUMMARY
        if key in comparison
    ]


def _number(value: Any, form: str = ".4g") -> str:
    """A number for people; what was not measured is a dash."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value) if isinstance(value, str) else "–"
    if isinstance(value, int) and not form.endswith("%"):
        return f"{value:,}".replace(",", "\u202f")
    return format(value, form).replace("-", "\u2212")


def _interval(ends: Any, form: str = ".4g") -> str:
    if not ends or None in ends:
        return ""
    return f"{_number(ends[0], form)} … {_number(ends[1], form)}"


def _columns(rows: Rows) -> list[str]:
    """All keys of the rows, in the order in which they first appear."""
    return list(dict.fromkeys(key for row in rows for key in row))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: Any, column: str) -> str:
    """One cell of a table whose columns say their unit in their name."""
    if _is_number(value) and column.endswith("bytes"):
        return charts.size_text(value)
    return _number(value)


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("compressor_eval"),
        autoescape=True,
        undefined=Undefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=_number, interval=_interval, columns=_columns, cell=_cell, size=charts.size_text
    )
    environment.tests["numeric"] = _is_number
    return environment.get_template("report.html.j2")
