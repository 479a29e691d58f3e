"""A packed layer keeps its product, and makes it anew when its tensors or its plan change."""

import torch
from torch import nn

from compressor.artifact.formats import LayerFormat
from compressor.artifact.packing import dense_weight, pack_weight
from compressor.modeling.packed_linear import PackedLinear, unrounded_inputs


def layer_and_weight():
    torch.manual_seed(0)
    fmt = LayerFormat(4, 32, True, "float16")
    codes, scale = torch.randint(0, 16, (48, 64)).byte(), torch.rand(48, 2)
    packed = pack_weight(codes, scale, torch.full((48, 2), 8), fmt)
    layer = PackedLinear(
        packed, torch.ones(48), device=torch.device("cpu"), dtype=torch.float32, rounds=True
    )
    return layer, dense_weight(packed)


def test_moved_tensors_are_computed_with():
    layer, _ = layer_and_weight()
    x = torch.randn(3, 64)
    before = layer(x)
    layer.float()  # other scales, the same numbers
    assert torch.equal(layer(x), before)
    layer.half().packed_scale.mul_(2)
    torch.testing.assert_close(layer(x).float(), 2 * before - 1, rtol=2e-3, atol=2e-2)


def test_rounding_of_inputs_stops_and_goes_on():
    layer, dense = layer_and_weight()
    x = torch.randn(3, 64)
    exact, rounded = x @ dense.t() + 1, layer(x)
    with unrounded_inputs(nn.ModuleList([layer])):
        torch.testing.assert_close(layer(x), exact, rtol=1e-5, atol=1e-4)
    assert torch.equal(layer(x), rounded)
    if layer.rounds:  # without a compiler nothing rounds
        assert not torch.equal(rounded, exact)


def test_leading_dimensions_are_kept_by_a_product_made_before():
    layer, _ = layer_and_weight()
    x = torch.randn(2, 3, 64)
    assert torch.equal(layer(x).view(6, 48), layer(x.view(6, 64)))
