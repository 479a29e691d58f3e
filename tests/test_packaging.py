"""The wheel holds everything an installed user needs: packages, recipes, tasks, the models."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    skipped = shutil.ignore_patterns(
        ".git", ".venv", "out", "build", "*.egg-info", "tests", "__pycache__"
    )
    shutil.copytree(ROOT, source, ignore=skipped)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    command += ["--disable-pip-version-check", "-w", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return wheel.namelist()


@pytest.mark.parametrize(
    "name",
    [
        "compressor/py.typed",
        "compressor/cli/app.py",
        "compressor_kernels/dequant_gemm.py",
        "compressor_kernels/configs.json",
        "compressor_kernels/native/linear.c",
        "compressor_kernels/native/simd.h",
        "compressor_eval/templates/report.html.j2",
        "compressor/reference_model/base/model.safetensors",
        "compressor/reference_model/draft/tokenizer.json",
        "compressor/reference_model/data/calibration.jsonl",
    ],
)
def test_the_wheel_holds_code_and_package_data(wheel_names, name):
    assert name in wheel_names


@pytest.mark.parametrize(
    "ending", ["recipes/full.yaml", "tasks/next_line_mc.yaml", "suites/quick.yaml"]
)
def test_the_wheel_holds_recipes_tasks_and_suites(wheel_names, ending):
    assert any(n.endswith(f"share/compressor/{ending}") for n in wheel_names)


def test_the_wheel_holds_no_folder_that_hides_another_package(wheel_names):
    top = {n.partition("/")[0] for n in wheel_names}
    assert not top & {"kernels", "eval", "tests", "benchmarks", "reference"}
