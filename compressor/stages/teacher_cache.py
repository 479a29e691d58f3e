"""What the teacher says about the training rows, asked once and kept on disk.

    FOLDER/<digest of the key>/
        key.json                     what it belongs to, word for word
        rows-00000.safetensors       targets of 64 training rows
        held-out-00000.safetensors   last hidden states of held-out rows, fp32
        done.json                    SHA-256 of every file, written last

The key holds the teacher's weights, the rows' digest, the kind and number of targets, temperature
and (of drawn ones) the seed; another value of any of them is another folder. Files appear by one
rename each, so a killed run goes on behind the last one. Held-out rows keep exact hidden states,
not targets: KL and best state are judged as without a cache, with the teacher's head alone.

# N rows, T tokens, D width of the teacher
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from compressor.algorithms.distillation import Divergence
from compressor.algorithms.sparse_logits import (
    Sampled,
    TopK,
    bytes_per_token,
    decode,
    encode,
    sample,
    top_k,
)
from compressor.modeling.whole import WholeModel
from compressor.recipe import DistillConfig
from compressor.recipe.distillation import Teacher
from compressor.run_dir import sha256_file, write_atomic
from compressor.stages.profile import cache_base

log = logging.getLogger("compressor.teacher_cache")

VERSION = 1
ROWS_PER_FILE = 64
DONE = "done.json"
Tell = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class CacheKey:
    """Everything that decides what is in a cache."""

    teacher: str
    rows: str
    shape: tuple[int, int]
    held_out: int
    kind: str
    count: int
    temperature: float
    seed: int
    version: int = VERSION

    def text(self) -> str:
        """As JSON."""
        body = {name: getattr(self, name) for name in CacheKey.__slots__}
        return json.dumps(body, sort_keys=True, indent=1) + "\n"


def key_of(
    config: DistillConfig, teacher: str, tokens: Tensor, *, held_out: int, seed: int
) -> CacheKey:
    """The key of a stage's cache; the seed matters to drawn targets only."""
    asked = config.teacher
    return CacheKey(
        teacher=teacher,
        rows=hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        shape=(tokens.shape[0], tokens.shape[1]),
        held_out=held_out,
        kind=asked.targets,
        count=asked.count,
        temperature=config.temperature,
        seed=seed if asked.targets == "sampled" else 0,
    )


def cache_bytes(
    asked: Teacher, rows: tuple[int, int], held_out: int, sizes: tuple[int, int]
) -> int:
    """Bytes of a cache of [N, T] rows; sizes are the teacher's vocabulary and width."""
    vocabulary, width = sizes
    kept = (rows[0] - held_out) * rows[1] * bytes_per_token(asked.targets, asked.count, vocabulary)
    return kept + held_out * rows[1] * 4 * width


class TeacherCache:
    """Targets by the number of a row, read when they are asked for."""

    def __init__(self, place: str, key: CacheKey) -> None:
        """`place` is "auto" or a folder."""
        root = cache_base() / "teachers" if place == "auto" else Path(place).expanduser()
        self.key = key
        self.folder = root / hashlib.sha256(key.text().encode()).hexdigest()[:32]
        self._open: dict[str, Any] = {}

    def is_whole(self) -> bool:
        """Whether every file is there and as it was written."""
        try:
            known = json.loads((self.folder / DONE).read_bytes())
            whole = known.items() == {n: sha256_file(self.folder / n) for n in known}.items()
        except (OSError, ValueError, AttributeError):
            return False
        if not whole:
            log.warning(
                "the teacher's cache %s is damaged: the teacher is asked again", self.folder
            )
            for file in self.folder.glob("*.safetensors"):
                file.unlink()
            (self.folder / DONE).unlink()
        return bool(whole)

    def fill(self, teacher: WholeModel, tokens: Tensor, tell: Tell) -> None:
        """Ask the teacher about rows [N, T], the last ones held out; go on where it stopped."""
        write_atomic(self.folder / "key.json", self.key.text().encode())
        trained = len(tokens) - self.key.held_out
        names = []
        for begin in range(0, len(tokens), ROWS_PER_FILE):
            for held_out in (False, True):
                first = begin if not held_out else max(begin, trained)
                last = min(begin + ROWS_PER_FILE, len(tokens) if held_out else trained)
                if first >= last:
                    continue
                name = _file_name(begin, held_out)
                names.append(name)
                if not (self.folder / name).exists():
                    made = self._rows(teacher, tokens, range(first, last), held_out=held_out)
                    write_atomic(self.folder / name, save(made))
            tell(min(begin + ROWS_PER_FILE, len(tokens)), len(tokens))
        digests = {name: sha256_file(self.folder / name) for name in names}
        write_atomic(self.folder / DONE, json.dumps(digests, indent=1).encode())

    @torch.no_grad()
    def _rows(
        self, teacher: WholeModel, tokens: Tensor, numbers: range, *, held_out: bool
    ) -> dict[str, Tensor]:
        found = [
            self._row(teacher, teacher.hidden_states(tokens[n, None])[0][0], n, held_out)
            for n in numbers
        ]
        return {name: torch.stack([row[name] for row in found]).cpu() for name in found[0]}

    def _row(
        self, teacher: WholeModel, hidden: Tensor, number: int, held_out: bool
    ) -> dict[str, Tensor]:
        """What is stored of one row, from its last hidden states [T, D]."""
        if held_out:
            return {"hidden": hidden}
        key, divergence = self.key, Divergence(temperature=self.key.temperature)
        logits = teacher.head(hidden)
        if key.kind == "top_k":
            return encode(top_k(logits, key.count, divergence), logits.shape[-1])
        generator = torch.Generator(logits.device).manual_seed(key.seed * 1_000_003 + number)
        return encode(sample(logits, key.count, divergence, generator), logits.shape[-1])

    def read(self, numbers: Tensor, device: torch.device) -> TopK | Sampled:
        """Targets of rows, as [rows x T] tokens."""
        rows = [self._stored(int(n), held_out=False) for n in numbers]
        return decode({name: torch.cat([r[name] for r in rows]).to(device) for name in rows[0]})

    def held_out(self, numbers: Tensor, device: torch.device) -> Tensor:
        """Last hidden states [rows, T, D] of held-out rows, by their number among all rows."""
        rows = [self._stored(int(n), held_out=True)["hidden"] for n in numbers]
        return torch.stack(rows).to(device)

    def _stored(self, number: int, *, held_out: bool) -> dict[str, Tensor]:
        """The tensors of one row; nothing else of its file is read."""
        begin = number - number % ROWS_PER_FILE
        name = _file_name(begin, held_out)
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, "pt")
        trained = self.key.shape[0] - self.key.held_out
        place = number - (max(begin, trained) if held_out else begin)
        file = self._open[name]
        return {key: file.get_slice(key)[place] for key in file.keys()}  # noqa: SIM118 (no dict)


def _file_name(begin: int, held_out: bool) -> str:
    return f"{'held-out' if held_out else 'rows'}-{begin // ROWS_PER_FILE:05d}.safetensors"
