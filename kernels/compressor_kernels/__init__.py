"""Kernels for compressed linears: reference, Triton, CPU, and the dispatch between them.

A library of its own: it needs torch and triton and nothing from the rest of the project. Start
with `reference.py` (what is computed), then `layout.py` (how it is stored), `dequant_gemm.py` (the
Triton kernel) and `dispatch.py` (which of them runs where, and why).
"""

__version__ = "0.1.0"
