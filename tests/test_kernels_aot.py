"""Compile for GPUs that are not here, and hold the main loop to its instruction budget."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import compressor_kernels
from compressor_kernels.bundle import artifact_bundle, kernel_digest
from compressor_kernels.tuning import GemmSpec

ROOT = Path(compressor_kernels.__file__).parents[1]
# older Triton takes mma.sync (HMMA) for the smallest tier on every NVIDIA target
MATRIX_OP = {
    "sm_80": ("HMMA",),
    "sm_90": ("HGMMA", "HMMA"),
    "sm_100": ("UTC", "HMMA"),
    "sm_120": ("HMMA",),
    "gfx942": ("v_mfma",),
    "gfx950": ("v_mfma",),
}
# Counts that are over what memory allows, held to what they were plus a tenth (Triton 3.9).
ABOVE = {
    ("gfx950", "int4 g128", 16): 272,
}
QUICK = [
    ("sm_80", "int4 g128", 8),
    ("sm_90", "int4 g128", 8),
    ("sm_90", "int3 g128", 16),
    ("sm_90", "e4m3 row", 16),
    ("sm_90", "MXFP4", 16),
    ("sm_100", "int4 g128, zero points", 16),
    ("sm_120", "int4 g128", 16),
    ("gfx942", "int4 g32", 32),
    ("gfx950", "int4 g128", 16),
]
SLOW = [
    ("sm_80", "int8 g128", 32),
    ("sm_90", "int4 g128", 64),
    ("sm_90", "int4 g32", 16),
    ("sm_90", "int8 row", 64),
    ("sm_90", "NVFP4", 16),
    ("sm_90", "NVFP4", 32),
    ("sm_90", "int2 g128", 16),
    ("sm_90", "int2 g128", 32),
    ("sm_100", "int4 g128", 16),
    ("sm_120", "NVFP4", 16),
]
PROGRAM = """
import json, sys
from compressor_kernels import budget
wanted = json.loads(sys.argv[1])
rows = [
    budget.run_job(budget.tier_job(arch, name, rows), None) | {"format": name, "rows": rows}
    for arch, name, rows in wanted
]
print(json.dumps(rows))
"""


def in_a_process(tmp_path_factory, program, argument):
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "TRITON_DISABLE_LINE_INFO": "1",
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", program, json.dumps(argument)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return in_a_process(tmp_path_factory, PROGRAM, QUICK)


def check_spills(rows):
    assert [row["spills"] for row in rows] == [0] * len(rows)


def check_matrix_ops(rows):
    for row in rows:
        assert all(op.startswith(MATRIX_OP[row["arch"]]) for op in row["matrix_ops"]), row
        assert row["loop_matrix_ops"] > 0, row


def check_budget(rows):
    for row in rows:
        known = ABOVE.get((row["arch"], row["format"], row["rows"]), 0)
        count = max(row["issue_slots"], row["matrix_clocks"])
        assert 0 < row["issue_slots"] <= count <= max(row["issue_limit"], known), row


def test_no_kernel_spills_registers(compiled):
    check_spills(compiled)


def test_every_main_loop_runs_on_the_tensor_cores(compiled):
    check_matrix_ops(compiled)


def test_weights_come_sixteen_bytes_at_a_time(compiled):
    assert [row["arch"] for row in compiled if not row["wide_loads"]] == []


def test_the_tiers_stay_within_their_instruction_budget(compiled):
    check_budget(compiled)


@pytest.mark.slow
def test_further_formats_neither_spill_nor_exceed_the_budget(tmp_path_factory):
    rows = in_a_process(tmp_path_factory, PROGRAM, SLOW)
    check_spills(rows)
    check_matrix_ops(rows)
    check_budget(rows)


def test_the_digest_is_of_the_installed_sources_and_stable():
    assert kernel_digest() == kernel_digest()
    assert len(kernel_digest()) == 64


def test_a_bundle_lists_the_digest_of_every_file_it_wrote(tmp_path):
    digests = artifact_bundle([], [], tmp_path)
    assert digests["kernel_digest"] == kernel_digest()
    assert "source/dequant_gemm.py" in digests["files"]
    for name, digest in digests["files"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest


@pytest.mark.slow
def test_a_bundle_for_an_architecture_holds_a_binary_for_every_tier(tmp_path):
    digests = artifact_bundle([GemmSpec("int4", 128, (256, 256))], ["sm_90"], tmp_path)
    assert sum(name.startswith("binaries/sm_90/") for name in digests["files"]) == 5
    launch = json.loads((tmp_path / "launch.json").read_text())
    assert launch["sm_90"]["256x256/int4/g128"]["1"]["block_m"] == 8
