"""Run single stages on tiny checkpoints, and look at what they left."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compressor.algorithms.divergence import kl_tokens
from compressor.data import TokenRows
from compressor.data import token_rows as make_rows
from compressor.errors import Interrupted
from compressor.modeling.checkpoint import open_checkpoint
from compressor.modeling.families import disk_name
from compressor.modeling.linears import StoredLinear, packed_from_tensors
from compressor.modeling.load import load_tokenizer
from compressor.modeling.state import ModelState
from compressor.modeling.whole import WholeModel
from compressor.recipe import DataConfig
from compressor.recipe.models import STAGE_CONFIGS
from compressor.run_dir import RunDir, StageRun
from compressor.stages import distill, prune, quantize, transform
from compressor.stages.context import StageContext, StageReport
from tests.fixtures_models import SENTENCES

_APPLY: dict[str, Callable[[Any, StageContext], StageReport]] = {
    "prune": prune.apply,
    "quantize": quantize.apply,
    "distill": distill.apply,
    "transform": transform.apply,
}


def token_rows(count: int = 12, length: int = 32) -> TokenRows:
    """Random rows that every tiny model understands."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 320, (count, length), generator=generator)
    return TokenRows(tokens, torch.ones_like(tokens, dtype=torch.bool), "random")


def short_distillation(folder: Path) -> dict[str, Any]:
    """Keys of a distill stage that takes a second."""
    text = folder / "text.txt"
    text.write_text("\n".join(" ".join(SENTENCES[i % 5 :]) for i in range(24)))
    data = DataConfig(source=str(text), num_samples=16, seq_len=24, packing="joined")
    steps = {"steps": 6, "checkpoint_steps": 2, "batch_size": 4, "warmup_steps": 1}
    return {"data": data, "learning_rate": 2e-3, **steps}


@dataclass
class Stopping:
    """A stage's journal that raises Interrupted at the n-th progress event."""

    run: StageRun
    after: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.run, name)

    def progress(self, event: dict[str, Any]) -> None:
        self.after -= 1
        if self.after == 0:
            raise Interrupted("stopped by the test")


class Bench:
    """A checkpoint, a run folder, and stages run one after another."""

    def __init__(self, model: Path, folder: Path, *, calibrated: bool = True) -> None:
        self.model, self.folder = model, folder
        self.original = ModelState.of_checkpoint(open_checkpoint(model))
        self.tokens = token_rows() if calibrated else None
        self.index = 0

    def apply(
        self, state: ModelState, kind: str, *, stop_after: int = 0, index: int = 0, **keys: Any
    ) -> StageReport:
        """Run one stage; the same index resumes it."""
        self.index += 1
        with RunDir.open(self.folder, identity={"test": "1"}) as folder:
            run = folder.stage(index or self.index, kind)
            context = StageContext(
                state=state,
                original=self.original,
                run=Stopping(run, stop_after) if stop_after else run,  # type: ignore[arg-type]
                tokens=self.tokens,
                artifact=self.folder / "artifact",
                source=self.model,
                seed=0,
            )
            return _APPLY[kind](STAGE_CONFIGS[kind].model_validate({"kind": kind, **keys}), context)


def weights(state: ModelState) -> dict[str, torch.Tensor]:
    """Every linear's weight [O, I] as stored, by full name."""
    skeleton, found = state.skeleton(), {}
    for position in range(len(state.blocks)):
        block = state.read_block(position, skeleton)
        for name, fmt in block.formats.items():
            linear = StoredLinear(torch.empty(0), None)
            linear.set_packed(packed_from_tensors(block.tensors, name, fmt))
            found[f"{position}.{name}"] = linear.dense()
        dense = {n: t for n, t in block.tensors.items() if n.endswith("proj.weight")}
        found |= {f"{position}.{n.removesuffix('.weight')}": t for n, t in dense.items()}
    return found


@torch.no_grad()
def logits(state: ModelState, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] of the model that a state describes."""
    model = WholeModel(state)
    hidden = model.hidden_states(tokens)[-1]
    return model.head(hidden.flatten(0, 1)).view(*tokens.shape, -1)


def export(state: ModelState, path: Path) -> Path:
    """Write a dense state as a plain Hugging Face folder."""
    path.mkdir()
    skeleton = state.skeleton()
    tensors = dict(state.read_outer(skeleton))
    for position in range(len(state.blocks)):
        prefix = f"{skeleton.blocks_name}.{position}."
        block = state.read_block(position, skeleton).tensors
        names = {name: prefix + disk_name(skeleton.model_type, name) for name in block}
        tensors |= {names[name]: t.contiguous() for name, t in block.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(state.config))
    return path


def units(folder: Path) -> dict[str, bytes]:
    """Every unit file of a run by name."""
    root = folder / "units"
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*.safetensors"))}


def groups_hold(weight: torch.Tensor, zeros: int, width: int) -> bool:
    """Whether every group of neighbouring columns has at least so many zeros."""
    grouped = weight.reshape(weight.shape[0], -1, width)
    return bool(((grouped == 0).sum(-1) >= zeros).all())


def held_out_kl(bench: Bench, state: ModelState, keys: dict[str, Any]) -> float:
    """KL on the rows the stage held out, measured anew from what is stored."""
    rows = make_rows(keys["data"], load_tokenizer(bench.model), vocab_size=320)
    tokens = rows.tokens[-(len(rows.tokens) // 8) :]
    return float(kl_tokens(logits(bench.original, tokens), logits(state, tokens)).mean())
