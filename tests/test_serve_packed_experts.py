"""Which layers of experts are computed in one launch; the sums are in test_kernels_ops.py."""

import pytest
import torch

from compressor.artifact.formats import LayerFormat
from compressor.artifact.packing import pack_weight
from compressor.modeling.experts import Expert, SplitExperts
from compressor.modeling.packed_linear import PackedLinear
from compressor.serve.packed_experts import PackedExperts, pack_experts, resident_bytes
from compressor_kernels import dispatch


@pytest.fixture
def by_triton(monkeypatch):
    """Linears are laid out as on a GPU."""
    pytest.importorskip("triton")
    monkeypatch.setattr(dispatch, "choose", lambda *_: ("triton", "here"))


def packed(linear, bits=4, group=32, activations="none"):
    rows, columns = linear.out_features, linear.in_features
    size = (rows, 1 if group == -1 else columns // group)
    fmt = LayerFormat(bits, group, True, "float32", activations=activations)
    weight = pack_weight(
        torch.zeros(rows, columns).byte(), torch.ones(size), torch.full(size, 1 << (bits - 1)), fmt
    )
    return PackedLinear(weight, None, device=torch.device("cpu"), dtype=torch.float16)


def model_of(**formats):
    """A model with one layer of three experts; `formats` of the last expert's linears."""
    experts = SplitExperts(Expert(64, 32, torch.nn.functional.silu) for _ in range(3))
    for index, expert in enumerate(experts):
        for name, child in list(expert.named_children()):
            setattr(expert, name, packed(child, **(formats if index == 2 else {})))
    return torch.nn.ModuleDict({"experts": experts})


@pytest.mark.usefixtures("by_triton")
def test_layers_that_triton_computes_are_taken_with_all_their_bytes():
    model = model_of()
    before = sum(m.resident_bytes for m in model.modules() if isinstance(m, PackedLinear))
    assert pack_experts(model) == []
    assert isinstance(model["experts"], PackedExperts)
    assert not [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert resident_bytes(model) == before


@pytest.mark.usefixtures("by_triton")
def test_experts_of_several_formats_stay_apart_and_are_named():
    model = model_of(bits=8)
    (note,) = pack_experts(model)
    assert note.startswith("experts: experts are computed one after another: ")
    assert isinstance(model["experts"], SplitExperts)


@pytest.mark.usefixtures("by_triton")
def test_experts_that_round_their_inputs_stay_as_they_are():
    model = model_of(bits=8, group=-1, activations="int8")
    assert pack_experts(model) == []
    assert isinstance(model["experts"], SplitExperts)


def test_a_cpu_keeps_its_way():
    model = model_of()
    assert pack_experts(model) == []
    assert isinstance(model["experts"], SplitExperts)


@pytest.mark.usefixtures("by_triton")
def test_tiles_grow_with_the_tokens_of_an_expert():
    experts = PackedExperts(model_of()["experts"])
    assert [experts._block(n) for n in (1, 48, 49, 96, 97, 10_000)] == [16, 16, 32, 32, 64, 64]
