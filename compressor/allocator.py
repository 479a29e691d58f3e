"""How the C library keeps freed memory."""

from __future__ import annotations

import ctypes
import os
import sys

# parameters of glibc's mallopt, and bytes
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, ARENA_MAX = -1, -2, -3, -8
SETTINGS = {MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 1 << 30, TOP_PAD: 64 << 20, ARENA_MAX: 1}


def keep_freed_memory() -> bool:
    """Use freed memory again instead of giving it back to the system at once; whether it is so.

    Every micro-batch makes and frees tensors of some megabytes. By default each is mapped anew and
    its pages are filled with zeros first, which took a sixth of the time of small models. Up to
    1 GiB that is free may then stay with the process. Only for glibc, and not when the
    environment chose otherwise (MALLOC_*, GLIBC_TUNABLES, LD_PRELOAD).
    """
    chosen = [n for n in os.environ if n.startswith("MALLOC_") or n == "GLIBC_TUNABLES"]
    if not sys.platform.startswith("linux") or chosen or "LD_PRELOAD" in os.environ:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*setting) for setting in SETTINGS.items())
