"""Freed memory is kept only where the C library can do it and nobody chose otherwise."""

import os
import subprocess
import sys

import pytest

SCRIPT = "from compressor.allocator import keep_freed_memory; print(keep_freed_memory())"


def said(**more: str) -> str:
    chosen = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    env = {k: v for k, v in os.environ.items() if not k.startswith(chosen)} | more
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=env)
    return done.stdout.strip()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_glibc_keeps_freed_memory_unless_told_otherwise():
    assert said() == "True"
    assert said(MALLOC_TRIM_THRESHOLD_="1000000") == "False"
    assert said(GLIBC_TUNABLES="glibc.malloc.arena_max=2") == "False"
