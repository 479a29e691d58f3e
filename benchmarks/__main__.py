"""`python -m benchmarks` lists the benchmarks, `python -m benchmarks NAME ...` runs one."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "quality": "damage for each byte, ours and other tools'",
    "prune_distill": "pruning, repair, distillation: ours, other tools', from scratch",
    "prune_budget": "blocks, widths and bits for one size, against bits alone",
    "order": "the same parts in different orders: damage for each byte",
    "transforms": "scales and rotations, with and without outlier channels",
    "memory": "peak memory of quantizing a model of 4 GB",
    "growth": "time against layers and tokens, and on a block of a 1 B model",
    "distill_speed": "tokens a second and memory of distillation against a plain loop",
    "cpu": "speed of linears and of a whole model on this CPU, against torch and llama.cpp",
    "kill": "runs killed at random moments and resumed: the same bytes?",
}


def main(arguments: list[str]) -> int:
    """Run the benchmark named first; returns the exit code."""
    if not arguments or arguments[0] not in BENCHMARKS:
        lines = [f"{name:14} {what}" for name, what in BENCHMARKS.items()]
        sys.stdout.write("\n".join(["usage: python -m benchmarks NAME [--help]", *lines, ""]))
        return 0 if not arguments else 2
    importlib.import_module(f"benchmarks.{arguments[0]}").main(arguments[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
