"""What an artifact carries about its kernels, for reading and checking; never for running.

`artifact_bundle` writes, for the layer shapes of one model:

    source/*   the kernel package as it was: Python, C, configs.json
    launch.json                        configuration per architecture, layer shape and M bucket
    binaries/<arch>/*                  compiled kernels
    compiled.json                      registers, spills, instructions a loop of each binary
    digests.json                       sha256 of every file, and the digest of the package

A runtime compares `kernel_digest()` with the one in the artifact and says when they differ; it
always executes its own installed kernels: code from a downloaded folder is not to be trusted.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from compressor_kernels.tuning import GemmSpec, KernelConfig, choose_config

TIERS = (1, 8, 16, 32, 64, 128)


class BundleError(RuntimeError):
    """The kernels could not be compiled; the text ends with the compiler's words."""


def kernel_sources() -> dict[str, bytes]:
    """Name -> bytes of every source file of the installed package, in order of name."""
    package = files("compressor_kernels")
    entries = [*package.iterdir(), *package.joinpath("native").iterdir()]
    wanted = [item for item in entries if item.name.endswith((".py", ".json", ".c", ".h"))]
    return {item.name: item.read_bytes() for item in sorted(wanted, key=lambda item: item.name)}


def kernel_digest() -> str:
    """Sha256 over the names and bytes of the installed kernel sources."""
    digest = hashlib.sha256()
    for name, content in kernel_sources().items():
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def artifact_bundle(
    layers: Sequence[GemmSpec], archs: Sequence[str], out_dir: Path
) -> dict[str, Any]:
    """Write the bundle into `out_dir` (made if missing) and return `digests.json`.

    Compiles in a child process. Raises BundleError when that fails. No `archs`: no binaries.
    """
    (out_dir / "source").mkdir(parents=True, exist_ok=True)
    for name, content in kernel_sources().items():
        (out_dir / "source" / name).write_bytes(content)
    if archs and layers:
        launch, jobs = launch_table(layers, archs)
        _write_json(out_dir / "launch.json", launch)
        _compile(jobs, out_dir)
    digests = {
        "kernel_digest": kernel_digest(),
        "files": {
            path.relative_to(out_dir).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(out_dir.rglob("*"))
            if path.is_file() and path.name != "digests.json"
        },
    }
    _write_json(out_dir / "digests.json", digests)
    return digests


def launch_table(
    layers: Sequence[GemmSpec], archs: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Launch configurations by architecture, layer and M; and the distinct kernels they need."""
    table: dict[str, Any] = {}
    jobs: dict[str, dict[str, Any]] = {}
    for arch in archs:
        for layer in layers:
            group = f"{layer.kind}/g{layer.group_size}{'a' if layer.has_zeros else ''}"
            key = f"{layer.shape[0]}x{layer.shape[1]}/{group}"
            for rows in TIERS:
                config = choose_config(arch, layer, rows)
                table.setdefault(arch, {}).setdefault(key, {})[str(rows)] = asdict(config)
                job = _job(arch, layer, replace(config, split_k=min(config.split_k, 2)))
                jobs[json.dumps(job, sort_keys=True)] = job
    return table, list(jobs.values())


def _job(arch: str, layer: GemmSpec, config: KernelConfig) -> dict[str, Any]:
    """A kernel to compile; every split-K above one is the same kernel."""
    variant = {
        "kind": layer.kind,
        "group_size": layer.group_size,
        "has_zeros": layer.has_zeros,
        "scale_kind": layer.scale_kind,
        "even_k": layer.shape[1] % layer.block_k == 0,
    }
    return {"arch": arch, "config": asdict(config), "variant": variant}


def _compile(jobs: list[dict[str, Any]], out_dir: Path) -> None:
    """Run `compressor_kernels.aot` on the jobs in a child process."""
    job_file = out_dir / "jobs.json"
    _write_json(job_file, jobs)
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "TRITON_DISABLE_LINE_INFO": "1",  # 10-40 KB a binary instead of 60-120
        "TRITON_DEFAULT_FP_FUSION": "1",
        "TRITON_INTERPRET": "0",
    }
    command = [sys.executable, "-m", "compressor_kernels.aot", "--jobs", str(job_file)]
    command += ["--binaries", str(out_dir / "binaries"), "--out", str(out_dir / "compiled.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    job_file.unlink()
    if done.returncode != 0:
        raise BundleError(f"compiling the kernels failed ({done.returncode}): {done.stderr[-800:]}")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
