"""Damage for each byte, ours and other tools', in one run on the same tokens.

    make bench-peers                                            # the other tools, once
    python -m benchmarks quality                                # everything that is there
    python -m benchmarks quality --models reference --tools ours-default llmc-gptq --bits 4 3
    python -m benchmarks quality --only table                   # tables again from the results
    python -m benchmarks quality --only timing                  # see timing.py

Protocol: all linears of the decoder blocks; head, embeddings and norms stay. 128 rows of 192 tokens
for calibration, as many held out for judging; see `subjects.py`, `cases.py`, `scoring.py`. What is
finished is kept in --work and in the results, and is not run again unless --fresh asks for it.
Nothing is tuned on the evaluation text.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.cases import BITS, OURS, PEERS, Case, budget_cases, uniform_cases
from benchmarks.jobs import Place, forget, is_done, run_case
from benchmarks.scoring import Judge
from benchmarks.subjects import NUM_ROWS, SEQ_LEN, Subject, calibration, evaluation, subjects
from benchmarks.tables import documents_file, write_tables
from compressor.errors import CompressError

Rows = list[dict[str, Any]]
KINDS = ("sym", "asym", "budget")
IDENTITY = ("tool", "bits", "group", "symmetric", "seed", "budget")
log = logging.getLogger("benchmarks.quality")


def main(arguments: list[str]) -> None:
    """Run the cases asked for, then write the tables."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    options = _parse(arguments)
    known = subjects(options.shared)
    chosen = {n: known[n] for n in options.models if known[n].model.is_dir()}
    for name in sorted(set(options.models) - set(chosen)):
        log.warning("%s is left out: %s is not there", name, known[name].model)
    place = Place(options.peers.absolute(), options.work.absolute(), options.threads)
    if options.only == "timing":
        timing.measure(list(chosen.values()), place, options.out)
    elif options.only != "table":
        for subject in chosen.values():
            _run_subject(subject, place, options)
    write_tables(options.out)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks quality")
    names = list(subjects(Path()))
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    parser.add_argument("--tools", nargs="+", default=[*OURS, *PEERS], choices=[*OURS, *PEERS])
    parser.add_argument("--bits", nargs="+", type=int, default=list(BITS), choices=BITS)
    parser.add_argument("--groups", nargs="+", type=int, help="default: all of the model")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--seeds", type=int, default=1, choices=(1, 2, 3))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("timing", "table"))
    parser.add_argument("--again", action="store_true", help="score finished checkpoints again")
    parser.add_argument("--fresh", action="store_true", help="compress finished cases again")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--peers", type=Path, default=Path("build"))
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args(arguments)


def _run_subject(subject: Subject, place: Place, options: argparse.Namespace) -> None:
    held_out = evaluation(subject, work=place.work)
    samples = [calibration(subject, s, work=place.work) for s in range(options.seeds)]
    file = options.out / f"quality-{subject.name}.json"
    protocol = _protocol(subject, [s.digest for s in samples], held_out.digest)
    judge: Judge | None = None
    for case in _wanted(subject, options):
        if options.fresh:
            forget(case, subject, place=place)
        elif not options.again and _known(_read(file), case) and is_done(case, subject, place):
            continue
        line = run_case(case, subject, samples[case.seed], place=place)
        if "error" not in line:
            judge = judge or Judge.of(subject.model, held_out.file)
            line |= _score(judge, place.work / subject.name / case.label, case)
            _keep_documents(options.out, subject.name, case, line.pop("kl_documents", None))
        row = {**{key: getattr(case, key) for key in IDENTITY}, **line}
        log.info("%s %s: %s", subject.name, case.label, line.get("error", line.get("kl_mean")))
        _write(file, protocol, row)


def _wanted(subject: Subject, options: argparse.Namespace) -> list[Case]:
    tools, seeds = options.tools, options.seeds
    found: list[Case] = []
    if "budget" in options.kinds:
        found += budget_cases(tools, groups=subject.budget_groups, seeds=seeds)
    uniform = uniform_cases(tools, groups=subject.groups, bits=options.bits, seeds=seeds)
    found += [c for c in uniform if ("sym" if c.symmetric else "asym") in options.kinds]
    return [c for c in found if options.groups is None or c.group in options.groups]


def _score(judge: Judge, folder: Path, case: Case) -> dict[str, Any]:
    try:
        return judge.score(folder, case)
    except (CompressError, ValueError) as error:
        return {"error": f"not scored: {str(error).splitlines()[0]}"}


def _protocol(subject: Subject, samples: list[str], held_out: str) -> dict[str, Any]:
    return {
        "model": subject.name,
        "rows": NUM_ROWS,
        "seq_len": SEQ_LEN,
        "packing": subject.packing,
        "calibration": [subject.calibration.name, *(digest[:16] for digest in samples)],
        "evaluation": [subject.evaluation.name, held_out[:16]],
        "linears": "all of the decoder blocks; embeddings, norms and head untouched",
        "arithmetic": "float32",
    }


def _keep_documents(out: Path, model: str, case: Case, values: list[float] | None) -> None:
    """KL by document, so that anybody can compute paired intervals."""
    file = documents_file(out, model)
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found |= {} if values is None else {case.label: values}
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(found[k])}" for k in sorted(found))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def _read(file: Path) -> Rows:
    if not file.is_file():
        return []
    rows: Rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return rows


def _known(rows: Rows, case: Case) -> bool:
    """Whether the case has figures; one that failed is tried again."""
    same = [r for r in rows if all(r[key] == getattr(case, key) for key in IDENTITY)]
    return any("error" not in r for r in same)


def _write(file: Path, protocol: dict[str, Any], row: dict[str, Any]) -> None:
    """Put the row in place of an older one of the same case, and keep the order."""
    others = [r for r in _read(file) if any(r[key] != row[key] for key in IDENTITY)]
    rows = sorted([*others, row], key=lambda r: [str(r[key]) for key in IDENTITY])
    lines = ",\n  ".join(json.dumps(r) for r in rows)
    text = f'{{\n "protocol": {json.dumps(protocol)},\n "rows": [\n  {lines}\n ]\n}}\n'
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
