"""Compile for GPUs that are not here, and hold the main loop to its instruction budget."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import compressor_kernels
from compressor_kernels.bundle import LayerFormat, artifact_bundle, kernel_digest

ROOT = Path(compressor_kernels.__file__).parents[1]
# older Triton takes mma.sync (HMMA) for the smallest tier on every NVIDIA target
MATRIX_OP = {
    "sm_80": ("HMMA",),
    "sm_90": ("HGMMA", "HMMA"),
    "sm_100": ("UTC", "HMMA"),
    "gfx942": ("v_mfma",),
}
PROGRAM = """
import json, sys
from pathlib import Path
from compressor_kernels import aot
wanted = [("sm_80", 8), ("sm_80", 64), ("sm_90", 8), ("sm_90", 16), ("sm_90", 32), ("sm_90", 64),
          ("sm_100", 16), ("gfx942", 16), ("gfx942", 32)]
jobs = [aot.tier(arch, rows) for arch, rows in wanted]
jobs += [aot.tier("sm_90", 16, aot.Variant(32, symmetric=False)),
         aot.tier("sm_90", 8, aot.Variant(-1, symmetric=False, dtype="fp16", even_k=False))]
rows = [aot.run_job(job, None) for job in jobs]
budgets = {arch: {str(m): n for m, n in limits.items()} for arch, limits in aot.BUDGET.items()}
print(json.dumps({"rows": rows, "budget": budgets, "triton": aot.triton.__version__}))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "TRITON_DISABLE_LINE_INFO": "1",
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_no_kernel_spills_registers(compiled):
    assert [row["spills"] for row in compiled["rows"]] == [0] * len(compiled["rows"])


def test_every_main_loop_runs_on_the_tensor_cores(compiled):
    for row in compiled["rows"]:
        assert all(op.startswith(MATRIX_OP[row["arch"]]) for op in row["matrix_ops"]), row
        assert row["loop_matrix_ops"] > 0, row


def test_the_tiers_stay_within_their_instruction_budget(compiled):
    for row in compiled["rows"]:
        variant = row["variant"]
        older_amd = row["arch"] == "gfx942" and compiled["triton"] < "3.9"  # 40 % more there
        if variant["group_size"] == 128 and not older_amd:
            limit = compiled["budget"][row["arch"]][str(row["config"]["block_m"])]
            assert 0 < row["issue_slots"] <= limit, row


def test_the_hopper_tiers_issue_fewer_instructions_than_a_tile_takes_to_arrive(compiled):
    hopper = [row for row in compiled["rows"] if row["arch"] == "sm_90"]
    slots = [row["issue_slots"] for row in hopper if row["variant"]["group_size"] == 128]
    assert len(slots) == 4
    assert max(slots) <= 440


def test_the_digest_is_of_the_installed_sources_and_stable():
    assert kernel_digest() == kernel_digest()
    assert len(kernel_digest()) == 64


def test_a_bundle_lists_the_digest_of_every_file_it_wrote(tmp_path):
    digests = artifact_bundle([], [], tmp_path)
    assert digests["kernel_digest"] == kernel_digest()
    assert "source/dequant_gemm.py" in digests["files"]
    for name, digest in digests["files"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest


def test_a_group_size_without_a_kernel_gets_no_binary(tmp_path):
    digests = artifact_bundle([LayerFormat((64, 64), 16, True)], ["sm_90"], tmp_path)
    assert all(name.startswith("source/") for name in digests["files"])


@pytest.mark.slow
def test_a_bundle_for_an_architecture_holds_a_binary_for_every_tier(tmp_path):
    digests = artifact_bundle([LayerFormat((256, 256), 128, True)], ["sm_90"], tmp_path)
    assert sum(name.startswith("binaries/sm_90/") for name in digests["files"]) == 4
    launch = json.loads((tmp_path / "launch.json").read_text())
    assert launch["sm_90"]["256x256/g128"]["1"]["block_m"] == 8
