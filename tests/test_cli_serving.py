"""`serve`, `generate` and `bench` pass on what was given, and nothing else."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from compressor.cli.app import run_command
from compressor.serve.bench import BenchOptions
from compressor.serve.options import ServeOptions
from compressor.serve.sequence import SamplingParams
from compressor_kernels import native

Output = pytest.CaptureFixture[str]
Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Replaces everything that would load a model by a recorder."""
    found: Calls = []
    answer = types.SimpleNamespace(text="\x1b[2Jb", token_ids=[1], finish_reason="stop")
    answers: dict[str, Any] = {
        "serve": None,
        "generate_text": [answer],
        "run_bench": {"num_requests": 1},
        "run_smoke": {"checks": [{"name": "parity", "ok": False, "detail": "x"}], "speed": {}},
    }  # fmt: skip

    def record(name: str) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            found.append((args, named))
            return answers[name]

        return call

    modules = {"server": "serve", "offline": "generate_text", "smoke": "run_smoke"}
    for module, name in modules.items():
        fake = types.ModuleType(f"compressor.serve.{module}")
        setattr(fake, name, record(name))
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr("compressor.serve.bench.run_bench", record("run_bench"))
    monkeypatch.delenv("COMPRESS_API_KEY", raising=False)
    return found


def test_serve_without_flags_uses_the_defaults_of_the_options(calls: Calls, tmp_path: Path) -> None:
    assert run_command(["serve", str(tmp_path)]) == 0
    assert calls[0][0] == (tmp_path, ServeOptions())


def test_serve_flags_reach_the_options(calls: Calls, tmp_path: Path) -> None:
    words = ["serve", str(tmp_path), "--port", "0", "--host", "::1", "--kv-cache", "1MiB"]
    words += ["--no-verify", "--strict-api", "--drain-timeout", "2.5", "--max-num-seqs", "4"]
    words += ["--kv-cache-dtype", "fp8", "--no-cuda-graphs"]
    assert run_command(words) == 0
    wanted = ServeOptions(
        host="::1", port=0, kv_cache_bytes=2**20, verify=False, strict_api=True,
        drain_timeout_s=2.5, max_num_seqs=4, kv_cache_dtype="fp8",
        cuda_graphs=False,
    )  # fmt: skip
    assert calls[0][0][1] == wanted


def test_an_open_address_without_a_key_is_refused(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_command(["serve", str(tmp_path), "--host", "0.0.0.0"]) == 2
    monkeypatch.setenv("COMPRESS_API_KEY", "secret")
    assert run_command(["serve", str(tmp_path), "--host", "0.0.0.0"]) == 0
    assert calls[0][0][1].api_key == "secret"


@pytest.mark.parametrize("words", [["--kv-cache", "2"], ["--port", "x"], ["--max-num-seqs", "0"],
                                   ["--kv-cache-dtype", "int3"]])  # fmt: skip
def test_bad_serve_flags_are_usage_errors(words: list[str], calls: Calls, tmp_path: Path) -> None:
    assert run_command(["serve", str(tmp_path), *words]) == 2
    assert calls == []


def test_a_failed_smoke_test_exits_with_11_and_one_object(
    calls: Calls, tmp_path: Path, capsys: Output
) -> None:
    assert run_command(["serve", str(tmp_path), "--smoke", "--json"]) == 11
    assert "parity" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_generate_prints_text_without_control_characters(
    calls: Calls, tmp_path: Path, capsys: Output
) -> None:
    words = ["generate", str(tmp_path), "-p", "a", "--temperature", "0", "--stop", "\n"]
    assert run_command(words) == 0
    assert capsys.readouterr().out == "a\\x1b[2Jb\n"
    params = calls[0][1]["params"]
    assert params == SamplingParams(max_tokens=128, temperature=0, stop=("\n",))


def test_generate_needs_a_prompt_and_a_model(calls: Calls, tmp_path: Path) -> None:
    assert run_command(["generate", str(tmp_path)]) == 2
    assert run_command(["generate", str(tmp_path / "none"), "-p", "a"]) == 4


def test_bench_takes_a_folder_or_a_url(calls: Calls, tmp_path: Path, capsys: Output) -> None:
    assert run_command(["bench", "http://127.0.0.1:1", "--concurrency", "2"]) == 0
    assert run_command(["bench", str(tmp_path), "--json"]) == 0
    assert calls[0][0] == ("http://127.0.0.1:1", BenchOptions(concurrency=2))
    assert calls[1][0] == (tmp_path, BenchOptions())
    assert run_command(["bench", "http://127.0.0.1:1", "--offline"]) == 2


def test_doctor_reports_versions_kernels_and_a_model(capsys: Output) -> None:
    assert run_command(["doctor", "reference", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["package"] for row in found["versions"]} >= {"torch", "python", "ruamel.yaml"}
    assert any(name.startswith("kernel W4A16") for name in found["machine"])
    assert found["machine"]["C kernels"] == native.reason()
    assert found["model"]["tensors"] > 10


def test_doctor_refuses_a_version_out_of_range(
    capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.cli.doctor.requirements", lambda: ["pydantic<1", "no-such>=2"])
    assert run_command(["doctor"]) == 10
    err = capsys.readouterr().err
    assert "pip install 'pydantic<1' 'no-such>=2'" in err


def test_doctor_checks_headers_of_a_model(tmp_path: Path) -> None:
    assert run_command(["doctor", str(tmp_path)]) == 4
