"""llm-compressor's SparseGPT and Wanda on given tokens, saved as a dense checkpoint.

    PEER_PYTHON -m benchmarks.prune_peers '{"tool": "llmc-sparsegpt", "model": DIR,
                                           "tokens": FILE.pt, "pattern": "2:4", "out": DIR}'

It runs with the tool's own interpreter and prints one JSON line as `peers.py` does. A pattern of
null means 50 % unstructured. All linears of the decoder blocks are pruned.
"""

# mypy: disable-error-code="import-not-found"
from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from benchmarks.peers import Job, Weights, costs, load, oneshot_seconds, weights_of, write_dense


def main() -> None:
    """Run the job given as the only argument."""
    job: Job = json.loads(sys.argv[1])
    torch.manual_seed(0)
    seconds, weights = prune(job)
    write_dense(Path(job["model"]), weights, Path(job["out"]))
    sys.stdout.write("\n" + json.dumps({"seconds": round(seconds, 2), **costs()}) + "\n")


def prune(job: Job) -> tuple[float, Weights]:
    """Seconds of the tool's own call, and the pruned weights."""
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    kind = {"llmc-sparsegpt": SparseGPTModifier, "llmc-wanda": WandaPruningModifier}[job["tool"]]
    modifier = kind(
        sparsity=0.5,
        mask_structure=job["pattern"] or "0:0",
        targets=["Linear"],
        ignore=["re:.*lm_head"],
    )
    model = load(job)
    seconds = oneshot_seconds(job, model, modifier, "sequential")
    return seconds, weights_of(model)


if __name__ == "__main__":
    main()
