"""`compress tune DIR`: measure launch configurations for an artifact's layers, or compile them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compressor.cli import flags
from compressor.errors import ResourceError, UnsupportedError, UsageError, Where

if TYPE_CHECKING:
    from compressor_kernels.tuning import GemmSpec

Folder = Annotated[Path, typer.Argument(help="Folder of an artifact.")]
CompileOnly = Annotated[
    bool, typer.Option("--compile-only", help="Compile every configuration; needs no GPU.")
]
Archs = Annotated[
    list[str] | None, typer.Option("--arch", help="With --compile-only: sm_90, gfx942, ...")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Table file, or with --compile-only folder, to write."),
]


def tune(
    path: Folder,
    compile_only: CompileOnly = False,
    arch: Archs = None,
    out: Out = None,
    as_json: flags.AsJson = False,
) -> None:
    """Measure the GPU kernels for the layers of an artifact and remember the fastest."""
    from compressor import console

    with console.session(as_json=as_json):
        if bool(arch) != compile_only:
            fix = "compress tune DIR --compile-only --arch sm_90"
            raise UsageError("--arch and --compile-only go together", code="US01", fix=fix)
        from compressor.stages.kernels import artifact_layers

        layers = artifact_layers(path)
        if compile_only:
            folder = out or path.with_name(f"{path.name}-kernels")
            report = compile_layers(layers, arch or [], folder)
        else:
            report = measure_layers(layers, out)
    if as_json:
        console.show_json(report)
    else:
        console.show_facts(report)


def measure_layers(layers: list[GemmSpec], out: Path | None) -> dict[str, Any]:
    """Time every layer at every bucket of M and write the table that the runtime reads."""
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedError(
            "tuning measures kernels on a GPU, and there is none",
            code="KE01",
            fix="run it where the artifact will be served, or add --compile-only --arch ARCH",
        )
    from compressor_kernels.tune import measure_on_gpu, tune_layers, write_table
    from compressor_kernels.tuning import device_arch, user_table_path

    name = device_arch(torch.device("cuda"))
    entries = tune_layers(name, layers, measure_on_gpu)
    target = out or user_table_path()
    machine = torch.cuda.get_device_name()
    write_table(target, entries, about=f"compress tune on {machine}, torch {torch.__version__}")
    return {"layers": len(layers), "entries": len(entries), "arch": name, "table": str(target)}


def compile_layers(layers: list[GemmSpec], archs: list[str], folder: Path) -> dict[str, Any]:
    """Every configuration the rule or the table would launch, as binaries with their facts."""
    from compressor_kernels.aot import TARGETS
    from compressor_kernels.bundle import BundleError, artifact_bundle

    unknown = sorted(set(archs) - set(TARGETS))
    if unknown:
        fix = f"one of {', '.join(sorted(TARGETS))}"
        raise UsageError(f"no such architecture: {', '.join(unknown)}", code="US01", fix=fix)
    try:
        digests = artifact_bundle(layers, archs, folder)
    except BundleError as error:
        raise ResourceError(str(error), code="KE03", where=Where(str(folder))) from error
    binaries = sum(name.startswith("binaries/") for name in digests["files"])
    return {"layers": len(layers), "archs": archs, "binaries": binaries, "folder": str(folder)}
