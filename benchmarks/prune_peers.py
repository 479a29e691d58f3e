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
import time
from pathlib import Path

import torch

from benchmarks.peers import Job, Weights, costs, load, tokenizer_of, weights_of, write_dense


def main() -> None:
    """Run the job given as the only argument."""
    job: Job = json.loads(sys.argv[1])
    torch.manual_seed(0)
    seconds, weights = prune(job)
    write_dense(Path(job["model"]), weights, Path(job["out"]))
    sys.stdout.write("\n" + json.dumps({"seconds": round(seconds, 2), **costs()}) + "\n")


def prune(job: Job) -> tuple[float, Weights]:
    """Seconds of the tool's own call, and the pruned weights."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    kind = {"llmc-sparsegpt": SparseGPTModifier, "llmc-wanda": WandaPruningModifier}[job["tool"]]
    modifier = kind(
        sparsity=0.5,
        mask_structure=job["pattern"] or "0:0",
        targets=["Linear"],
        ignore=["re:.*lm_head"],
    )
    tokens, model = torch.load(job["tokens"]), load(job)
    ones = torch.ones_like(tokens).tolist()
    rows = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": ones})
    start = time.monotonic()
    oneshot(
        model=model,
        tokenizer=tokenizer_of(job),
        dataset=rows,
        recipe=modifier,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    return time.monotonic() - start, weights_of(model)


if __name__ == "__main__":
    main()
