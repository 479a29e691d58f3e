"""The command line starts fast, builds recipes from flags and turns every failure into a code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from compressor import __version__
from compressor.cli.app import exit_code, run_command
from compressor.cli.recipes import find_recipe, shipped
from compressor.errors import CompressError, GateError, Interrupted, RecipeError
from compressor.recipe import Recipe, load_recipe

Output = pytest.CaptureFixture[str]


@dataclass
class Pipeline:
    """Stands in for compressor.pipeline: remembers what it was asked to do."""

    recipe: Recipe | None = None
    options: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None

    def run(self, recipe: Recipe, options: dict[str, Any]) -> types.SimpleNamespace:
        self.recipe, self.options = recipe, options
        if self.error is not None:
            raise self.error
        summary = {"average_bits": 4.25, "perplexity_ratio": float("nan"), "parts": {"a": 1}}
        return types.SimpleNamespace(
            output=Path(recipe.output), verdict="pass", report=None, summary=summary
        )


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    fake = Pipeline()
    module = types.ModuleType("compressor.pipeline")
    vars(module).update(run=fake.run, RunOptions=dict)
    monkeypatch.setitem(sys.modules, "compressor.pipeline", module)
    return fake


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["recipe", "validate", "w4"], ["recipe", "ls"],
              ["quantize", "reference", "--recipe-out", "/dev/null", "--overwrite"],
              ["run", "--help"], ["run", "no-such-recipe"]],
)  # fmt: skip
def test_light_commands_leave_torch_and_transformers_alone(words: list[str]) -> None:
    code = f"""
import sys
from compressor.cli.app import run_command
run_command({words!r})
print([name for name in ("torch", "transformers", "numpy") if name in sys.modules])
"""
    assert run_python(code).stdout.splitlines()[-1] == "[]"


def test_help_takes_less_than_half_a_second_of_processor_time() -> None:
    code = """
import time
from compressor.cli.app import run_command
run_command(["--help"])
print(time.process_time())
"""
    seconds = [float(run_python(code).stdout.splitlines()[-1]) for _ in range(2)]
    assert min(seconds) < 0.5


def test_the_version_is_printed(capsys: Output) -> None:
    assert run_command(["--version"]) == 0
    assert capsys.readouterr().out == f"compress {__version__}\n"


@pytest.mark.parametrize(
    "words", [["qantize"], ["run"], ["run", "w4", "--nope"], ["quantize", "m", "--group-size", "x"]]
)
def test_a_wrong_command_line_exits_with_2_and_one_json_object(
    words: list[str], capsys: Output
) -> None:
    assert run_command([*words, "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["exit"] == 2
    assert err.startswith("error[US01]")


def test_no_command_shows_the_help(capsys: Output) -> None:
    assert run_command([]) in (0, 2)
    out, err = capsys.readouterr()
    assert "quantize" in out + err


def test_a_recipe_is_found_by_file_or_by_shipped_name(tmp_path: Path) -> None:
    mine = tmp_path / "w4"
    mine.write_text("x")
    assert find_recipe(str(mine)) == mine
    assert find_recipe("w4").name == "w4.yaml"
    assert find_recipe("w4.yaml") == find_recipe("recipes/w4.yaml").resolve()
    with pytest.raises(RecipeError, match="no shipped recipe") as caught:
        find_recipe("fulll")
    assert "did you mean `full`" in caught.value.fix


@pytest.mark.parametrize("name", ["../w4", "/etc/w4", "w4/..", ""])
def test_only_bare_names_mean_shipped_recipes(name: str) -> None:
    with pytest.raises(RecipeError):
        find_recipe(name)


def test_run_hands_recipe_and_flags_to_the_pipeline(pipeline: Pipeline, capsys: Output) -> None:
    words = ["run", "w4", "--set", "stages.quantize.bits=3", "-o", "a b'c", "--fresh"]
    assert run_command([*words, "--run-dir", "R", "--overwrite", "--break-lock"]) == 0
    assert pipeline.recipe is not None
    assert pipeline.recipe.output == "a b'c"
    assert "command" in pipeline.options
    assert {name: pipeline.options[name] for name in list(pipeline.options)[:4]} == {
        "run_dir": Path("R"), "fresh": True, "overwrite": True, "break_lock": True
    }  # fmt: skip
    assert "verdict           pass" in capsys.readouterr().out


def test_run_with_json_prints_one_object(pipeline: Pipeline, capsys: Output) -> None:
    assert run_command(["run", "w4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verdict"] == "pass"
    assert result["summary"]["perplexity_ratio"] is None


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (GateError("gate"), 7), (Interrupted("stop", signal=2), 130),
        (Interrupted("stop", signal=15), 143), (Interrupted("stop"), 75),
        (KeyboardInterrupt(), 130), (ValueError("odd"), 1), (CompressError("ours"), 1),
    ],
)  # fmt: skip
def test_every_failure_has_its_exit_code_and_no_traceback(
    pipeline: Pipeline, capsys: Output, error: BaseException, code: int
) -> None:
    pipeline.error = error
    assert run_command(["run", "w4", "--json"]) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert "message" in json.loads(out)["error"]


def test_a_bug_saves_its_traceback_without_secrets_in_the_run_folder(
    pipeline: Pipeline, capsys: Output, tmp_path: Path
) -> None:
    pipeline.error = ValueError("token hf_abcdefghijklmnopqrstuvwxyz")
    assert run_command(["run", "w4", "--run-dir", str(tmp_path)]) == 1
    (file,) = tmp_path.iterdir()
    text = file.read_text()
    assert "Traceback" in text
    assert "hf_abc" not in text + capsys.readouterr().err


def test_debug_shows_the_traceback(pipeline: Pipeline, capsys: Output) -> None:
    pipeline.error = ValueError("odd")
    assert run_command(["run", "w4", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_exit_codes_of_signals() -> None:
    assert exit_code(Interrupted("x", signal=1)) == 129


def stages_of(words: list[str], tmp_path: Path) -> list[dict[str, Any]]:
    file = tmp_path / "made.yaml"
    assert run_command([*words, "--recipe-out", str(file)]) == 0
    return [stage.model_dump(exclude_unset=True) for stage in load_recipe(file).stages]


def test_quantize_flags_become_a_recipe(tmp_path: Path) -> None:
    words = ["quantize", "org/name", "--scheme", "W4A16", "--group-size", "-1", "--size", "6GiB"]
    words += ["--protect", "*.v_proj", "--protect", "re:.*o_proj", "--data", "t.txt"]
    stages = stages_of([*words, "--num-samples", "9"], tmp_path)
    assert stages == [
        {"kind": "calibrate", "data": {"source": "t.txt", "num_samples": 9}},
        {"kind": "quantize", "scheme": "W4A16", "group_size": -1, "budget": {"size": "6GiB"},
         "protect": ["*.v_proj", "re:.*o_proj"]},
        {"kind": "pack"},
        {"kind": "verify"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "stage"),
    [
        (["--pattern", "2:4"], {"pattern": "2:4"}),
        (["--sparsity", "0.5", "--method", "wanda"], {"sparsity": 0.5, "method": "wanda"}),
        (["--width", "mlp=0.75", "--width", "kv_groups=2"],
         {"width": {"mlp": 0.75, "kv_groups": 2}}),
        (["--depth", "0.75"], {"depth": 0.75}),
        (["--depth", "6"], {"depth": 6}),
        (["--depth", "[0, 1, 5]"], {"depth": [0, 1, 5]}),
    ],
)  # fmt: skip
def test_prune_flags_become_a_recipe(
    flags: list[str], stage: dict[str, Any], tmp_path: Path
) -> None:
    assert stages_of(["prune", "reference", *flags], tmp_path)[1] == {"kind": "prune", **stage}


def test_distill_flags_become_a_recipe(tmp_path: Path) -> None:
    words = ["distill", "reference", "--student-layers", "4", "--student-size", "hidden_size=128"]
    stages = stages_of([*words, "--steps", "5", "--lr", "1e-3"], tmp_path)
    student = {"num_hidden_layers": 4, "hidden_size": 128}
    wanted = {"kind": "distill", "steps": 5, "learning_rate": 0.001, "student": student}
    stages[0].pop("warmup_steps")
    assert stages[0] == wanted


@pytest.mark.parametrize(
    ("flags", "student"),
    [([], {"depth": 0.25}), (["--student-layers", "2"], {"num_hidden_layers": 2})],
)
def test_a_draft_is_a_student_of_a_quarter_of_the_blocks_unless_sizes_are_given(
    flags: list[str], student: dict[str, Any], tmp_path: Path
) -> None:
    stages = stages_of(["distill", "reference", "--draft", *flags], tmp_path)
    assert stages[0] == {"kind": "distill", "student": student}


def test_flags_run_the_same_code_as_a_recipe(pipeline: Pipeline, capsys: Output) -> None:
    assert run_command(["quantize", "reference", "--set", "stages.quantize.bits=3"]) == 0
    assert pipeline.recipe is not None
    assert pipeline.recipe.output == "reference-quantized"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["quantize", "m", "--scheme", "W4A17"], "did you mean `W4A16`"),
        (["quantize", "m", "--average-bits", "1"], "at least 2.125"),
        (["prune", "m"], "exactly one of sparsity, pattern, width, depth and target"),
        (["prune", "m", "--width", "mlp"], "has no `=`"),
        (["prune", "m", "--depth", "[1"], "YAML syntax"),
        (["distill", "m", "--steps", "0"], "at least 1"),
        (["eval", "reference", "x", "--gate", "max_lk=1"], "did you mean `max_kl`"),
    ],
)
def test_a_wrong_flag_value_is_a_usage_error(words: list[str], says: str, capsys: Output) -> None:
    assert run_command(words) == 2
    assert says in capsys.readouterr().err


def test_recipes_can_be_listed_shown_and_copied(tmp_path: Path, capsys: Output) -> None:
    assert run_command(["recipe", "ls", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["recipes"]
    assert [row["name"] for row in listed] == list(shipped())
    target = tmp_path / "mine.yaml"
    assert run_command(["recipe", "cp", "full", str(target)]) == 0
    assert run_command(["recipe", "cp", "w4", str(target)]) == 8
    capsys.readouterr()
    assert run_command(["recipe", "show", "full"]) == 0
    assert capsys.readouterr().out == target.read_text()


def test_the_schema_is_json(capsys: Output) -> None:
    assert run_command(["recipe", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Recipe"


def test_resume_needs_a_run_folder(tmp_path: Path, capsys: Output) -> None:
    assert run_command(["resume", str(tmp_path)]) == 2
    assert "compress run RECIPE" in capsys.readouterr().err


def test_inspect_lists_layers_with_bytes_and_bits(capsys: Output) -> None:
    assert run_command(["inspect", "reference", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(row["bytes"] for row in found["rows"]) == found["total"]["weight bytes"]
    assert {row["bits a weight"] for row in found["rows"]} == {16.0}
