"""The comparison with other tools: cases, jobs, bytes, tables (no other tool is needed)."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import cases, jobs, ours, peers, quality, scoring, subjects, tables, timing
from benchmarks.cases import Case
from compressor.artifact.formats import LayerFormat
from compressor.modeling.checkpoint import open_checkpoint
from compressor.recipe import parse_recipe


def all_cases() -> list[Case]:
    tools, groups = [*cases.OURS, *cases.PEERS], (32, -1)
    uniform = cases.uniform_cases(tools, groups=groups, bits=[4, 2], seeds=3)
    return uniform + cases.budget_cases(tools, groups=groups, seeds=3)


def row(tool: str, kl: float, **changes: object) -> dict[str, object]:
    numbers = {"bits": 4, "group": 32, "symmetric": True, "seed": 0, "budget": None}
    damage = {"kl_mean": kl, "kl_mean_ci": [kl, kl], "kl_p99": kl, "top1_agreement": 0.9}
    ratio = {"perplexity_ratio": 1.0, "perplexity_ratio_ci": [1.0, 1.0]}
    cost = {"bytes": 1000, "average_bits": 4.5, "seconds": 1.0, "peak_mib": 10.0}
    return {"tool": tool, **numbers, **damage, **ratio, **cost, **changes}


def test_no_two_cases_share_a_folder():
    labels = [case.label for case in all_cases()]
    assert len(labels) == len(set(labels))


def test_tools_run_only_on_grids_they_have():
    assert not [c for c in all_cases() if c.tool == "hqq" and c.symmetric]
    assert not [c for c in all_cases() if c.tool == "torchao-hqq" and not c.symmetric]


def test_only_tools_that_read_the_calibration_rows_get_several_seeds():
    seeded = {c.tool for c in all_cases() if c.seed == 2}
    assert {"llmc-gptq", "ours-default", "autoround"} <= seeded
    assert not seeded & {"llmc-rtn", "ours-fast", "hqq", "torchao-rtn", "torchao-hqq"}


def test_budgets_are_ours_alone():
    tools = {c.tool for c in all_cases() if c.budget is not None}
    assert tools == set(cases.OURS_WITH_BUDGET)


@pytest.mark.parametrize("tool", list(cases.OURS))
def test_the_settings_of_our_variants_are_recipes(tool):
    for case in (Case(tool, 3, 32, symmetric=False), Case(tool, None, -1, True, budget=3.5)):
        job = {"model": "m", "out": "o", "data": {}, "settings": jobs.settings_of(case)}
        parse_recipe(json.dumps(ours.recipe_of(job)), file="case")


def test_a_tool_that_is_not_installed_is_named_as_such(tmp_path):
    subject = subjects.subjects(tmp_path)["reference"]
    tokens = subjects.Tokens(tmp_path / "t.pt", {}, "")
    place = jobs.Place(tmp_path, tmp_path / "work")
    line = jobs.run_case(Case("hqq", 4, 32, symmetric=False), subject, tokens, place=place)
    assert "make bench-peers" in line["error"]


def test_the_last_json_line_is_the_answer():
    text = 'noise\n{"seconds": 1, "peak_mib": 2}\n\nlate noise'
    assert jobs.last_line(text, 0) == {"seconds": 1, "peak_mib": 2}


def test_a_failed_process_leaves_its_error():
    text = "Traceback\nImportError: needs an accelerator\nclean-up"
    assert jobs.last_line(text, 1) == {"error": "ImportError: needs an accelerator"}


def test_seeds_share_no_row_and_the_pipeline_reads_the_same_tokens(tmp_path):
    subject = subjects.subjects(tmp_path)["reference"]
    samples = [subjects.calibration(subject, seed, work=tmp_path) for seed in range(3)]
    rows = [tuple(r) for s in samples for r in torch.load(s.file).tolist()]
    assert len(set(rows)) == len(rows) == 3 * subjects.NUM_ROWS
    assert len({s.digest for s in samples}) == 3


def test_dense_checkpoints_hold_the_replaced_linears(tiny_models, tmp_path):
    model = tiny_models("llama")
    names = scoring.quantized_linears(open_checkpoint(model))
    peers.write_dense(model, {n: torch.full(s, 0.5) for n, s in names.items()}, tmp_path / "o")
    stored, original = (
        load_file(tmp_path / "o/model.safetensors"),
        load_file(model / "model.safetensors"),
    )
    assert all((stored[f"{n}.weight"] == 0.5).all() for n in names)
    assert torch.equal(stored["lm_head.weight"], original["lm_head.weight"])


def test_a_linear_that_a_tool_left_out_is_an_error(tiny_models, tmp_path):
    with pytest.raises(SystemExit, match="left out"):
        peers.write_dense(tiny_models("llama"), {}, tmp_path / "o")


def test_bytes_are_codes_scales_and_untouched_tensors(tiny_models):
    original = open_checkpoint(tiny_models("llama"))
    shapes = scoring.quantized_linears(original)
    four = LayerFormat(4, 32, True, "float16")
    size = scoring.stored_size(original, dict.fromkeys(shapes, four), "llmc-rtn")
    weights = sum(a * b for a, b in shapes.values())
    linears = weights // 2 + 2 * weights // 32 + 16 * len(shapes)
    everything = sum(info.nbytes for info in original.tensors.values())
    assert size["bytes"] == everything - 4 * weights + linears
    assert size["average_bits"] == pytest.approx(8 * linears / weights, abs=1e-4)


def test_linears_left_alone_count_in_full(tiny_models):
    original = open_checkpoint(tiny_models("llama"))
    names = scoring.quantized_linears(original)
    size = scoring.stored_size(original, dict.fromkeys(names), "ours-default")
    assert size == {
        "bytes": sum(i.nbytes for i in original.tensors.values()),
        "average_bits": 32.0,
    }


def test_real_zero_points_cost_sixteen_bits(tiny_models):
    original = open_checkpoint(tiny_models("llama"))
    shapes = scoring.quantized_linears(original)
    sizes = [
        scoring.stored_size(
            original, dict.fromkeys(shapes, LayerFormat(4, 32, sym, "float16")), tool
        )["bytes"]
        for sym, tool in ((True, "llmc-rtn"), (False, "hqq"))
    ]
    assert sizes[1] - sizes[0] == 2 * sum(a * b for a, b in shapes.values()) // 32


def test_weights_off_their_grid_are_found():
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(32, 2, bias=False)])
    holder = torch.nn.Module()
    holder.model = model
    weight = torch.arange(16.0).repeat(2, 2)
    model.layers[0].weight = torch.nn.Parameter(weight)
    scoring.check_levels(holder, Case("hqq", 4, 32, symmetric=False))
    with pytest.raises(ValueError, match="16 different values"):
        scoring.check_levels(holder, Case("hqq", 3, 32, symmetric=False))


def test_remembered_logits_are_the_models_own(tiny_models):
    judge = scoring.Judge.of(tiny_models("llama"), _tokens_file(tiny_models("llama")))
    first = judge.base(input_ids=judge.tokens).logits
    assert torch.equal(first, judge.base.model(input_ids=judge.tokens).logits)
    assert judge.base(input_ids=judge.tokens).logits is first


def test_an_untouched_checkpoint_loses_nothing(tiny_models):
    model = tiny_models("llama")
    judge = scoring.Judge.of(model, _tokens_file(model))
    row = judge.score(model, Case("ours-default", None, 32, symmetric=True, budget=16.0))
    assert row["kl_mean"] == 0.0
    assert row["top1_agreement"] == 1.0


def _tokens_file(model: Path) -> Path:
    file = model.parent / "rows.pt"
    torch.save(torch.arange(48).reshape(3, 16) + 5, file)
    return file


def test_one_of_our_cases_runs_in_its_own_process(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(subjects, "NUM_ROWS", 4)
    monkeypatch.setattr(subjects, "SEQ_LEN", 16)
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": "the quick brown fox " * 20 + str(i)}) for i in range(18)]
    text.write_text("\n".join(lines))
    subject = subjects.Subject("tiny", tiny_models("llama"), text, text, (32,), (32,))
    tokens = subjects.calibration(subject, 1, work=tmp_path)
    place, case = jobs.Place(tmp_path, tmp_path), Case("ours-fast", 4, 32, symmetric=True)
    line = jobs.run_case(case, subject, tokens, place=place)
    assert line["seconds"] >= 0, line
    assert line["peak_mib"] > 0
    assert line["commit"] == jobs.commit()
    assert line["capability"] == torch.backends.cpu.get_cpu_capability()
    score = scoring.Judge.of(subject.model, _tokens_file(subject.model)).score(
        tmp_path / "tiny" / case.label, case
    )
    assert score["kl_mean"] > 0
    assert 4.5 <= score["average_bits"] < 4.6


def test_code_that_was_changed_since_its_commit_is_told_from_the_commit(tmp_path, monkeypatch):
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for file in (tmp_path / "code.py", results / "rows.json"):
        file.write_text("1")
    monkeypatch.setattr(jobs, "ROOT", tmp_path)
    asked = jobs.commit.__wrapped__
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert asked() is None
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    (results / "rows.json").write_text("2")
    clean = asked()
    assert clean
    assert "dirty" not in clean
    (tmp_path / "code.py").write_text("2")
    assert asked() == f"{clean}-dirty"


def test_tables_say_which_commits_and_processors_their_rows_come_from():
    known = {"commit": "abc", "capability": "AVX2"}
    rows = [row("a", 0.1, **known), row("b", 0.1, **known), row("c", 0.1)]
    assert tables.commits(rows) == "abc on AVX2 (2), unknown on unknown (1)"


def test_tables_put_the_least_damage_first_and_join_seeds():
    rows = [row("a", 0.03), row("b", 0.01), row("b", 0.02, seed=1)]
    lines = tables.table(rows, {}).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["b", "a"]
    assert "0.01 - 0.02" in lines[0]


def test_quotients_are_paired_by_document():
    hard_and_easy = [0.9, 0.1, 0.5, 0.2]
    documents = {
        "llmc-gptq-w4-g32-sym-seed0": hard_and_easy,
        "ours-default-w4-g32-sym-seed0": [0.5 * kl for kl in hard_and_easy],
    }
    assert tables.quotient(row("ours-default", 0.2), documents) == "0.500 [0.5, 0.5]"
    assert tables.quotient(row("llmc-gptq", 0.4), documents) == ""
    assert tables.quotient(row("ours-high", 0.1), documents) == ""


def test_documents_of_a_case_are_kept_beside_those_of_others(tmp_path):
    for kl in (0.5, 0.25):
        quality._keep_documents(tmp_path, "x", Case("hqq", 4, 32, symmetric=False), [kl])
    quality._keep_documents(tmp_path, "x", Case("autoround", 4, 32, symmetric=True), [0.1])
    found = tables._documents(tmp_path, "x")
    assert found == {"hqq-w4-g32-asym-seed0": [0.25], "autoround-w4-g32-sym-seed0": [0.1]}


def test_timing_takes_turns_and_reports_the_quotient_of_medians(tmp_path, monkeypatch):
    seconds = iter([1.0, 30.0, 2.0, 10.0, 3.0, 20.0])
    turns = []

    def run_case(case, subject, tokens, *, place):
        turns.append(case.tool)
        return {"seconds": next(seconds)}

    monkeypatch.setattr(timing, "run_case", run_case)
    monkeypatch.setattr(timing, "calibration", lambda *a, **k: None)
    subject = subjects.Subject("x", tmp_path, tmp_path, tmp_path, (32,), (32,))
    found = timing._pair(("ours-default", "autoround"), subject, jobs.Place(tmp_path, tmp_path))
    assert turns == ["ours-default", "autoround"] * 3
    assert found["ratio"] == 10.0


def test_the_front_holds_what_nothing_smaller_beats():
    rows = [row("a", 0.3, bytes=10), row("b", 0.4, bytes=20), row("c", 0.1, bytes=30)]
    assert [r["tool"] for r in tables.front(rows)] == ["a", "c"]


def test_a_row_replaces_the_one_of_the_same_case(tmp_path):
    file = tmp_path / "quality-x.json"
    for kl in (0.5, 0.25):
        quality._write(file, {"model": "x"}, row("a", kl))
    quality._write(file, {"model": "x"}, row("a", 0.1, seed=1))
    assert [r["kl_mean"] for r in quality._read(file)] == [0.25, 0.1]


def test_failures_are_listed_with_their_reason(tmp_path):
    calibration = {"calibration": ["c"], "evaluation": ["e"], "rows": 1, "seq_len": 2}
    body = {"protocol": {"model": "x", **calibration}, "rows": [row("a", 0.1)]}
    body["rows"].append(row("b", 0.1) | {"error": "no such width"})
    (tmp_path / "quality-x.json").write_text(json.dumps(body))
    tables.write_tables(tmp_path)
    assert "b, 4 bits g32 symmetric: no such width" in (tmp_path / "quality.md").read_text()
