"""The GPU bench runs from end to end in the interpreter, before it meets a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

BENCH = Path(__file__).parents[1] / "kernels/bench/bench_gpu.py"


def run(folder, *more):
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(BENCH), "--out", str(folder), *more]
    done = subprocess.run(
        command, env={**os.environ, **threads}, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(triton.__version__ < "3.7", reason="its interpreter breaks with numpy 2.4")
def test_every_part_runs_once_and_a_second_call_continues(tmp_path):
    assert run(tmp_path, "--dry-run", "--limit", "5") == (0, "")
    first = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert run(tmp_path, "--dry-run") == (0, "")
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert set(first) < set(parts)
    kinds = {name.split("/")[0] for name in parts}
    assert kinds == {"correctness", "decode", "attention", "layers"}
    assert all(row["ok"] for name, row in parts.items() if name.startswith("correctness"))
    assert not [n for row in parts.values() for n in row if n.endswith("error")]
    assert "dequant_gemm/nvfp4" in (tmp_path / "gpu.md").read_text()


def test_the_report_has_ratios_floors_and_a_plot(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH.parent))
    from gpu_report import write_report

    layer = {"shape": [4096, 4096], "rows": 1, "weight_bytes": 8_650_752, "ours": 4.0, "bf16": 8.0}
    parts = {
        "layers/8B/o/1": layer,
        "decode/1": {"W4": 1500.0, "bf16": 4000.0},
        "correctness/w4a8": {"errors": {"M1": 0.1}, "ok": False},
    }
    machine = {"gpu": "none", "arch": "sm_90"}
    write_report({"parts": parts, "machine": machine, "command": "bench"}, tmp_path)
    text = (tmp_path / "gpu.md").read_text()
    assert "| 8B/o/1 | 4.0 | - | - | 8.0 | - | - | 2.00 | 50 |" in text
    assert "| 1 | 1500.0 | 4000.0 | 2.67 |" in text
    assert "**NO**" in text
    assert (tmp_path / "roofline.png").stat().st_size > 1000
