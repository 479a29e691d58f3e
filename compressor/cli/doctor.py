"""`compress doctor`: is this machine, and this model, fit for work?"""

from __future__ import annotations

import os
import platform
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from compressor import __version__
from compressor.cli import flags
from compressor.errors import UnsupportedError

Row = dict[str, Any]

_PROJECT = Path(__file__).resolve().parent.parent.parent / "pyproject.toml"


def doctor(
    model: Annotated[str | None, typer.Argument(help="A model whose headers to check.")] = None,
    as_json: flags.AsJson = False,
) -> None:
    """Check versions, processor, kernels and the cache; with MODEL also its files."""
    from compressor import console

    with console.session(as_json=as_json):
        versions = version_rows()
        facts = {**_machine(), **_cache()}
        model_facts = _model_facts(model) if model else None
    if as_json:
        console.show_json({"versions": versions, "machine": facts, "model": model_facts})
    else:
        console.show_table(versions, title="versions")
        console.show_facts(facts)
        console.show_facts(model_facts or {})
    _refuse_bad_versions(versions)


def requirements() -> list[str]:
    """What the package needs, from its metadata or from the source tree."""
    if _PROJECT.is_file():
        return list(tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"])
    found = metadata.requires("compressor") or []
    return [item for item in found if "extra ==" not in item]


def version_rows() -> list[Row]:
    """Package, installed version, accepted range, and whether they agree."""
    from packaging.requirements import Requirement

    rows: list[Row] = [
        {"package": "compressor", "installed": __version__, "needed": "-", "ok": True},
        {
            "package": "python",
            "installed": platform.python_version(),
            "needed": ">=3.11",
            "ok": True,
        },
    ]
    for text in requirements():
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate():
            continue
        installed = _installed(need.name)
        fits = bool(installed) and need.specifier.contains(installed or "", prereleases=True)
        row = {"package": need.name, "installed": installed, "needed": str(need.specifier)}
        rows.append({**row, "ok": fits})
    return rows


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _refuse_bad_versions(rows: list[Row]) -> None:
    bad = [row for row in rows if not row["ok"]]
    if bad:
        pins = " ".join(f"'{row['package']}{row['needed']}'" for row in bad)
        names = ", ".join(f"{row['package']} {row['installed'] or '(missing)'}" for row in bad)
        raise UnsupportedError(
            f"outside of the supported versions: {names}",
            code="HU10", fix=f"pip install {pins}",
        )  # fmt: skip


def _machine() -> dict[str, Any]:
    import psutil
    import torch

    from compressor.algorithms.products import onednn_is_quicker

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "platform": f"{platform.system()} {platform.machine()}, python {sys.version_info[0]}."
        f"{sys.version_info[1]}",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "float32 products": "oneDNN" if onednn_is_quicker() else "as torch does",
        "cpu cores": os.cpu_count(),
        "memory bytes": psutil.virtual_memory().total,
        "gpus": gpus or "none",
        **_kernels("cuda" if gpus else "cpu"),
    }


def _kernels(device: str) -> dict[str, str]:
    """Which code would compute common packed layers here, and why."""
    from compressor_kernels import native
    from compressor_kernels.dispatch import plan_linear

    found = {"C kernels": native.reason()}
    for bits, symmetric in ((2, False), (3, False), (4, True), (8, True)):
        plan = plan_linear(
            device, bits=bits, group_size=128, symmetric=symmetric, shape=(4096, 4096)
        )
        label = f"kernel W{bits}A16{'' if symmetric else '_ASYM'}"
        found[label] = f"{plan.name} ({plan.reason})"
    return found


def _cache() -> dict[str, Any]:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    writable = os.access(existing, os.W_OK)
    home = str(Path.home())
    shown = re.sub(rf"^{re.escape(home)}(?=/|$)", "~", str(folder))
    return {"model cache": f"{shown} ({'writable' if writable else 'NOT writable'})"}


def _model_facts(model: str) -> dict[str, Any]:
    from compressor.modeling.checkpoint import open_checkpoint
    from compressor.modeling.hub import resolve_model

    resolved = resolve_model(model)
    checkpoint = open_checkpoint(resolved.path, strict=True)
    return {
        "model": f"{resolved.path.name}: headers are sound",
        "model type": checkpoint.config.get("model_type"),
        "tensors": len(checkpoint.tensors),
        "weight bytes": checkpoint.nbytes,
        "notes": list(checkpoint.notes) or "none",
    }
