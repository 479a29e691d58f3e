"""The C kernels give the reference's products, and their absence is told, not suffered."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from compressor_kernels import cpu, native
from compressor_kernels.dispatch import LinearSpec, plan_for
from compressor_kernels.reference import dequantize_checkpoint
from tests.test_kernels_dispatch import checkpoint

SHAPES = [(361, 172), (128, 256)]
GCC = shutil.which("gcc")
needs_library = pytest.mark.skipif(native.library() is None, reason=native.reason())
needs_gcc = pytest.mark.skipif(GCC is None, reason="no gcc")


def rounded(x):
    """The specification of eight-bit activations: blocks of 32, scale = largest / 127."""
    blocks = F.pad(x, (0, -x.shape[1] % 32)).view(len(x), -1, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * (127 / largest)).nan_to_num(0).round()
    return (codes * (largest / 127)).view(len(x), -1)[:, : x.shape[1]]


def relative_error(spec, rows, scale_dtype=torch.bfloat16):
    plan, tensors = plan_for("cpu", spec), checkpoint(spec)
    tensors["weight_scale"] = tensors["weight_scale"].to(scale_dtype)
    x = torch.randn(rows, spec.shape[1])
    dense = dequantize_checkpoint(tensors, spec.bits, spec.group_size).double()
    exact = (rounded(x) if spec.rounds else x).double() @ dense.t()
    y = plan.apply(x, plan.prepare(tensors))
    return float((y.double() - exact).norm() / exact.norm())


@needs_library
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("bits", range(2, 9))
def test_exact_products_are_those_of_the_reference(bits, group_size, symmetric):
    for shape in SHAPES:
        spec = LinearSpec(bits, group_size, symmetric, shape)
        assert plan_for("cpu", spec).name == "native"
        for rows in (1, 15, cpu.MANY_ROWS + 1):
            assert relative_error(spec, rows) < 2e-6, (shape, rows)


@needs_library
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("bits", range(2, 9))
def test_rounded_products_are_those_of_rounded_activations(bits, group_size, symmetric):
    for shape in SHAPES:
        spec = LinearSpec(bits, group_size, symmetric, shape, rounds=True)
        assert plan_for("cpu", spec).name == "native-int8"
        for rows in (1, 9):  # now and then a code at the edge of two falls to the other side
            assert relative_error(spec, rows) < 3e-3, (shape, rows)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scales_of_every_dtype_are_read_as_they_are(dtype):
    assert relative_error(LinearSpec(4, 32, True, (40, 64)), 2, dtype) < 2e-6


@needs_library
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_largest_codes_and_activations_do_not_overflow(bits):
    spec = LinearSpec(bits, 32, False, (16, 256), rounds=True)
    tensors, plan = checkpoint(spec), plan_for("cpu", spec)
    for packed, zero in ((-1, 0), (0, -1)):
        tensors["weight_packed"].fill_(packed)
        tensors["weight_zero_point"].fill_(zero)
        x = torch.ones(2, 256)
        dense = dequantize_checkpoint(tensors, bits, 32)
        torch.testing.assert_close(plan.apply(x, plan.prepare(tensors)), x @ dense.t())


@needs_library
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_row_and_many_rows_have_the_same_products(dtype, symmetric):
    spec = LinearSpec(
        4, 64, symmetric, (104, 320), rounds=True
    )  # thirteen bands: one without a pair
    tensors, plan = checkpoint(spec), plan_for("cpu", spec)
    tensors["weight_scale"] = tensors["weight_scale"].to(dtype)
    product, x = plan.bind(plan.prepare(tensors)), torch.randn(5, 320)
    single = torch.cat([product(row[None]) for row in x])
    torch.testing.assert_close(
        single, product(x), rtol=0, atol=2e-6 * float(product(x).abs().max())
    )


@needs_library
@pytest.mark.parametrize("rounds", [True, False])
def test_scratch_of_c_or_of_torch_gives_the_same_products(rounds):
    spec = LinearSpec(4, 32, True, (40, 4096), rounds=rounds)
    weight, x = native.Weight(4, 32, spec.shape), torch.randn(20, 4096)
    spare = native.needed().spare_bytes()
    one, all_rows = (native.work_bytes(weight, n, rounds=rounds) for n in (1, len(x)))
    assert one <= spare < all_rows
    plan = plan_for("cpu", spec)
    product = plan.bind(plan.prepare(checkpoint(spec)))
    one_by_one = torch.cat([product(row[None]) for row in x])
    torch.testing.assert_close(product(x), one_by_one, rtol=1e-4, atol=1e-4)


@needs_library
@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(rounds, value):
    spec = LinearSpec(4, 32, True, (16, 64), rounds=rounds)
    plan = plan_for("cpu", spec)
    x = torch.ones(3, 64)
    x[1, 40] = value
    y = plan.apply(x, plan.prepare(checkpoint(spec)))
    assert y.isfinite().all(1).tolist() == [True, False, True]


@needs_library
@pytest.mark.parametrize("rounds", [True, False])
def test_the_number_of_threads_does_not_change_a_bit(rounds):
    spec = LinearSpec(4, 32, True, (512, 256), rounds=rounds)
    plan, x = plan_for("cpu", spec), torch.randn(9, 256)
    resident = plan.prepare(checkpoint(spec))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(plan.apply(x, resident))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], y) for y in results)


@needs_library
def test_the_layout_takes_the_bytes_of_the_checkpoint():
    spec = LinearSpec(3, 32, False, (64, 256))
    tensors, plan = checkpoint(spec), plan_for("cpu", spec)
    stored = tensors["weight_packed"].nbytes + tensors["weight_scale"].nbytes
    assert plan.resident_bytes(plan.prepare(tensors)) == stored + 64 * 8  # zero points are bytes


def test_groups_that_cut_blocks_are_left_to_torch():
    assert plan_for("cpu", LinearSpec(4, 48, True, (64, 96))).name == "cpu-bytes"


# ------------------------------------------------------------------ compiling


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache, and nothing built yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.built.cache_clear()
    yield tmp_path
    native.built.cache_clear()


def test_it_can_be_switched_off(fresh, monkeypatch):
    monkeypatch.setenv(native.SWITCH, "0")
    assert native.library() is None
    assert native.reason() == "switched off by COMPRESSOR_NATIVE=0"
    assert plan_for("cpu", LinearSpec(4, 32, True, (64, 64))).name == "cpu-bytes"


def test_without_a_compiler_torch_computes_and_the_reason_is_told(fresh, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CC", raising=False)
    assert native.library() is None
    assert "no C compiler" in native.reason()
    assert "torch computes instead" in caplog.text


def test_a_compiler_that_fails_is_quoted(fresh, monkeypatch):
    script = fresh / "cc"
    script.write_text("#!/bin/sh\necho broken >&2\ntest $1 = --version\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    assert native.library() is None
    assert "broken" in native.reason()


@needs_gcc
def test_a_library_that_computes_wrongly_is_not_used(fresh, monkeypatch):
    sources = fresh / "native"
    sources.mkdir()
    empty = "".join(f"void {name}(void) {{}}\n" for name in native._SIGNATURES)
    more = 'const char *isa(void) { return "none"; }\n'
    more += "int lanes(void) { return 8; }\nint spare_bytes(void) { return 0; }\n"
    (sources / "empty.c").write_text(empty + more)
    monkeypatch.setattr(native, "SOURCES", sources)
    assert native.library() is None
    assert "wrong products" in native.reason()


def test_a_cache_that_others_can_write_is_refused(fresh):
    folder = fresh / "cache" / "compressor" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="chmod 700"):
        native.cache_folder()


@needs_gcc
def test_racing_compilations_leave_one_library_and_no_scraps(fresh, monkeypatch):
    sources = fresh / "native"
    sources.mkdir()
    (sources / "one.c").write_text("int one(void) { return 1; }\n")
    monkeypatch.setattr(native, "SOURCES", sources)
    with ThreadPoolExecutor(4) as pool:
        files = {f.result() for f in [pool.submit(native.compiled) for _ in range(4)]}
    assert len(files) == 1
    assert list(native.cache_folder().iterdir()) == list(files)


@needs_gcc
def test_other_sources_or_flags_make_another_library(fresh, monkeypatch):
    first = native.digest([GCC, "-O2"])
    assert native.digest([GCC, "-O3"]) != first
    monkeypatch.setattr(native, "processor", lambda: "another")
    assert native.digest([GCC, "-O2"]) != first


@needs_gcc
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["-mavx512f", "-mavx512bw", "-mavx512vnni", "-mfma"], "vpdpbusd"),
        (["-mavx2", "-mfma"], "vpmaddubsw"),
    ],
    ids=["AVX-512 VNNI", "AVX2"],
)
def test_every_x86_path_compiles_to_its_instructions(flags, expected, tmp_path):
    out = compiled_with(GCC, ["-march=x86-64", *flags], tmp_path)
    assert expected in out


ARM = shutil.which("aarch64-linux-gnu-gcc")


@pytest.mark.skipif(ARM is None, reason="no compiler for aarch64")
def test_the_arm_path_compiles_to_its_instructions(tmp_path):
    assert "sdot" in compiled_with(ARM, ["-march=armv8.2-a+dotprod"], tmp_path)


def compiled_with(compiler, flags, folder):
    """The assembly of linear.c, without a warning."""
    out = folder / "linear.s"
    base = [compiler, "-std=gnu11", "-O1", "-fopenmp", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    files = ["-S", str(native.SOURCES / "linear.c"), "-o", str(out)]
    subprocess.run([*base, *flags, *files], check=True, timeout=120)
    return out.read_text()


@needs_gcc
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86")
def test_the_path_without_vector_instructions_is_right_too(tmp_path):
    out = tmp_path / "plain.so"
    command = [GCC, "-std=gnu11", "-O1", "-march=x86-64", "-Wno-psabi", "-shared", "-fPIC"]
    files = [str(f) for f in native.SOURCES.glob("*.c")]
    subprocess.run([*command, *files, "-o", str(out), "-lm"], check=True, timeout=120)
    library = native._declare(ctypes.CDLL(str(out)))
    assert library.isa() == b"plain C"
    assert native._is_right(library)


@needs_library
def test_there_is_one_openmp_runtime_in_the_process():
    code = (
        "import torch; from compressor_kernels import native; native.library();"
        "lines = open('/proc/self/maps').read().split();"
        "print(len({w for w in lines if 'libgomp' in w or 'libomp' in w or 'libiomp' in w}))"
    )
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("needs /proc")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
