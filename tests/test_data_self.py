"""Text the model writes itself: seeded, independent of batches, resumable, as sampling demands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compressor.errors import DataError, Interrupted
from compressor.recipe.data import Sampling
from compressor.stages.self_text import draw, uniform
from tests.fixtures_models import SENTENCES
from tests.stage_fixtures import Bench, unit_files

Models = Callable[[str], Path]


def stage(**keys: Any) -> dict[str, Any]:
    sampling = {"batch_size": 4, **keys.pop("sampling", {})}
    data = {"source": "self", "num_samples": 6, "seq_len": 12, "packing": "packed", **keys}
    return {"kind": "calibrate", "data": {**data, "sampling": sampling}}


def written(model: Path, folder: Path, **keys: Any) -> torch.Tensor:
    report = Bench(model, folder).run(stage(**keys))
    assert report.tokens is not None
    return report.tokens.tokens


def test_the_same_seed_writes_the_same_text_whatever_the_batches(
    tiny_models: Models, tmp_path: Path
) -> None:
    model = tiny_models("llama")
    first = written(model, tmp_path / "a")
    assert first.shape == (6, 12)
    assert torch.equal(first, written(model, tmp_path / "b", sampling={"batch_size": 3}))
    assert not torch.equal(first, written(model, tmp_path / "c", seed=5))


@torch.no_grad()
def test_with_a_tiny_top_p_the_text_is_the_most_likely_one(
    tiny_models: Models, tmp_path: Path
) -> None:
    row = written(tiny_models("llama"), tmp_path / "run", sampling={"top_p": 1e-6})[0]
    model = AutoModelForCausalLM.from_pretrained(tiny_models("llama"), dtype=torch.float32)
    greedy = model(row[None]).logits[0].argmax(-1)
    end = (row == 2).nonzero().flatten().tolist() or [len(row) - 1]
    assert row[0] == 1
    assert torch.equal(row[1 : end[0] + 1], greedy[: end[0]])


def test_random_and_given_prefixes_begin_the_texts(tiny_models: Models, tmp_path: Path) -> None:
    model = tiny_models("llama")
    random = written(model, tmp_path / "r", sampling={"prefixes": "random"}, packing="joined")
    assert random[0, 0] == 1
    assert random[0, 1] > 2
    (tmp_path / "p.txt").write_text("\n\n".join(SENTENCES))
    keys = {"sampling": {"prefixes": str(tmp_path / "p.txt"), "prefix_tokens": 3}}
    rows = written(model, tmp_path / "p", **keys)
    from transformers import AutoTokenizer

    begin = AutoTokenizer.from_pretrained(model).encode(SENTENCES[0], add_special_tokens=False)[:3]
    assert rows[0, :4].tolist() == [1, *begin]


def test_a_killed_run_goes_on_from_the_last_batch(tiny_models: Models, tmp_path: Path) -> None:
    model = tiny_models("llama")
    Bench(model, tmp_path / "whole").run(stage())
    bench = Bench(model, tmp_path / "halves")
    with pytest.raises(Interrupted):
        bench.run(stage(), stop_at=1)
    unit = tmp_path / "halves/units/00-calibrate/self-00000.safetensors"
    assert set(load_file(unit)) == {"tokens", "lengths"}
    bench.run(stage())
    assert unit_files(tmp_path / "halves") == unit_files(tmp_path / "whole")


def test_prefixes_without_text_are_refused(tiny_models: Models, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="empty") as caught:
        written(
            tiny_models("llama"),
            tmp_path / "run",
            sampling={"prefixes": str(tmp_path / "empty.txt")},
        )
    assert caught.value.code == "CA02"


def test_draws_follow_the_distribution_that_temperature_and_top_p_leave() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(4000, 4)
    u = torch.tensor([uniform(0, n, 1) for n in range(4000)])
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 0.8)):
        p = torch.softmax(logits[0] / temperature, -1)
        p = torch.where(p.cumsum(-1) - p < top_p, p, 0.0)
        drawn = draw(logits, u, Sampling(temperature=temperature, top_p=top_p))
        share = torch.bincount(drawn, minlength=4) / 4000
        torch.testing.assert_close(share, p / p.sum(), atol=0.03, rtol=0)
