"""Tuning picks the fastest of sane candidates, and the runtime reads what it wrote."""

import json

import pytest
import torch

from compressor_kernels import tuning
from compressor_kernels.tune import candidates, tune_layers, write_table
from compressor_kernels.tuning import GemmSpec, choose_config, heuristic

SPEC = GemmSpec("int4", 128, (4096, 4096))


@pytest.fixture
def own_table(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.table.cache_clear()
    yield tuning.user_table_path()
    tuning.table.cache_clear()


def test_the_rule_is_the_first_candidate_and_none_comes_twice():
    for rows in (1, 64, 2048):
        found = candidates("sm_90", SPEC, rows)
        assert found[0] == heuristic("sm_90", SPEC, rows)
        assert len(found) == len(set(found))


def test_small_floats_have_no_raw_candidate():
    forms = {config.form for config in candidates("sm_90", GemmSpec("e4m3", -1, (64, 64)), 1)}
    assert "raw" not in forms


def test_the_fastest_candidate_is_kept_with_its_time(own_table):
    def measure(spec, rows, options):
        return [1.0 if config.num_stages == 5 else 2.0 for config in options]

    entries = tune_layers("sm_90", [SPEC], measure, buckets=(1,))
    write_table(own_table, entries, about="a test")
    assert choose_config("sm_90", SPEC, 1).num_stages == 5
    stored = json.loads(own_table.read_text())["configs"]
    assert stored["sm_90/dequant_gemm/int4/128/4096x4096/1"]["us"] == 1.0


def test_entries_of_other_layers_stay_in_the_table(own_table):
    for spec in (SPEC, GemmSpec("int8", -1, (64, 64))):
        entries = tune_layers("sm_90", [spec], lambda s, m, o: [1.0] * len(o), buckets=(1, 8))
        write_table(own_table, entries, about="a test")
    assert len(json.loads(own_table.read_text())["configs"]) == 4


def run(words, capsys):
    from compressor.cli.app import run_command

    code = run_command([*words, "--json"])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.fixture
def folder(tiny_models, tmp_path):
    """A real artifact with 4-bit layers."""
    from tests.stage_fixtures import W4, build_artifact

    return build_artifact(tiny_models("llama"), tmp_path / "work", W4).artifact


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_tuning_without_a_gpu_says_so_and_what_to_do(folder, capsys):
    code, text = run(["tune", str(folder)], capsys)
    assert code == 10
    assert "KE01" in text
    assert "--compile-only" in text


def test_the_layers_of_an_artifact_are_those_it_stores(folder):
    from compressor.stages.kernels import artifact_layers

    layers = artifact_layers(folder)
    assert {layer.kind for layer in layers} == {"int4"}
    assert len(layers) == len(set(layers)) > 1


def test_an_artifact_without_packed_layers_is_refused(tiny_models, capsys):
    code, text = run(["tune", str(tiny_models("llama"))], capsys)
    assert code == 10
    assert "KE02" in text


def test_an_architecture_alone_is_refused(tmp_path, capsys):
    code, text = run(["tune", str(tmp_path), "--arch", "sm_90"], capsys)
    assert code == 2
    assert "--compile-only" in text


def test_an_unknown_architecture_is_refused(folder, capsys):
    code, text = run(["tune", str(folder), "--compile-only", "--arch", "sm_91"], capsys)
    assert code == 2
    assert "sm_90" in text


@pytest.mark.slow
def test_every_configuration_of_an_artifact_is_compiled(folder, tmp_path, capsys):
    out = tmp_path / "kernels"
    words = ["tune", str(folder), "--compile-only", "--arch", "sm_90", "--out", str(out)]
    code, text = run(words, capsys)
    assert code == 0, text
    assert json.loads(text)["binaries"] == len(list((out / "binaries/sm_90").iterdir())) > 3
