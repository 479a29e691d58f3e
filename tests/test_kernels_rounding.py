"""The C loops of quantization against the same thing written with torch."""

import pytest
import torch

from compressor.algorithms import gptq as gptq_module
from compressor.algorithms.gptq import gptq
from compressor.algorithms.grid import mse_grid, quantize
from compressor_kernels import native
from compressor_kernels.native_rounding import (
    MOST_COLUMNS,
    UniformLevels,
    group_errors,
    group_scales,
    learned_gradients,
    learned_values,
    round_columns,
)

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.reason())


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_rounding(weights, before, root, levels, keep):
    """One weight at a time, in fp64."""
    columns, rows = weights.shape
    errors, misses = torch.zeros(columns, rows, dtype=torch.float64), torch.zeros(columns, rows)
    codes, clipped = torch.zeros(columns, rows, dtype=torch.uint8), torch.zeros(rows)
    for j in range(columns):
        scale, zero = (t[levels.group[j]].double() for t in (levels.scale, levels.zero))
        wanted = weights[j].double() + before[j] + root[:j, j].double() @ errors[:j]
        kept = wanted if keep is None else wanted * keep[j]
        asked = (kept / scale).round() + zero
        code = asked.clamp(0, levels.top)
        rounded = (code - zero) * scale
        errors[j], misses[j] = weights[j] - rounded, wanted - rounded
        codes[j], clipped = code, clipped + (code != asked)
    return errors, misses, codes, clipped


@pytest.mark.parametrize("rows", [1, 63, 64, 200])
@pytest.mark.parametrize("masked", [False, True])
def test_columns_are_rounded_as_one_by_one(rows, masked):
    weights, before = numbers(48, rows), 0.1 * numbers(48, rows, seed=1)
    root = 0.2 * numbers(48, 48, seed=2).triu(1)
    scale = 0.1 + numbers(3, rows, seed=3).abs()
    zero = torch.full((3, rows), 4.0)
    levels = UniformLevels(scale, zero, torch.arange(48) // 16, 7)
    keep = numbers(48, rows, seed=4) > 0 if masked else None
    errors, misses, codes, clipped = plain_rounding(weights, before, root, levels, keep)
    found = round_columns(weights, before, root, levels, keep)
    assert torch.equal(found[1], codes)
    assert torch.equal(found[2].float(), clipped)
    torch.testing.assert_close(found[0], misses, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(weights.double(), errors, atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_together_is_refused():
    levels = UniformLevels(torch.ones(1, 4), torch.ones(1, 4), torch.zeros(8).long(), 3)
    with pytest.raises(ValueError, match="do not belong"):
        round_columns(torch.ones(8, 4), torch.ones(8, 4), torch.ones(7, 7), levels)
    many = torch.ones(MOST_COLUMNS + 1, 4)
    with pytest.raises(ValueError, match="do not belong"):
        round_columns(many, many.clone(), torch.ones(len(many), len(many)), levels)
    with pytest.raises(ValueError, match="float32"):
        round_columns(torch.ones(8, 4).double(), torch.ones(8, 4), torch.ones(8, 8), levels)


@pytest.mark.parametrize("size", [1, 16, 32, 33, 128])
@pytest.mark.parametrize("weighted", [False, True])
def test_errors_of_groups_are_sums_of_squares(size, weighted):
    groups = numbers(5, 3, size)
    scale = 0.2 + 0.1 * numbers(5, 3, seed=1).abs()
    scale[0] *= -1  # symmetric grids may have negative scales
    zero = torch.randint(0, 16, (5, 3), generator=torch.Generator().manual_seed(2)).float()
    weight = numbers(1, 3, size, seed=3).square() if weighted else None
    code = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, 15)
    square = ((code - zero[..., None]) * scale[..., None] - groups).square()
    expected = (square if weight is None else square * weight).sum(-1)
    found = group_errors(groups, scale, zero, 15, weight)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_fitted_scales_have_the_smallest_error_for_their_codes(weighted):
    groups = numbers(6, 3, 32)
    groups[0] = 0  # no scale is better than another
    scale = 0.2 + 0.1 * numbers(6, 3, seed=1).abs()
    scale[1] *= -1
    scale[2] = 1e3  # every code is zero
    zero = torch.full((6, 3), 8.0)
    weight = numbers(1, 3, 32, seed=3).square() if weighted else None
    level = (groups / scale[..., None]).round().clamp(-8, 7)
    share = level if weight is None else level * weight
    fitted = (share * groups).sum(-1) / (share * level).sum(-1)
    expected = torch.where((fitted * scale > 0) & fitted.isfinite(), fitted, scale)
    found = group_scales(groups, scale, zero, 15, weight)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(found[0], scale[0])
    assert torch.equal(found[2], scale[2])

    def error(s: torch.Tensor) -> torch.Tensor:
        square = (level * s[..., None] - groups).square()
        return (square if weight is None else square * weight).sum(-1)

    for nearby in (0.99, 1.01):
        assert (error(found)[3:] < error(found * nearby)[3:]).all()


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, False), (4, True), (8, False)])
def test_gptq_and_its_grid_are_those_of_torch(bits, symmetric, monkeypatch):
    w, x = numbers(96, 160), numbers(600, 160, seed=1)
    mask = numbers(96, 160, seed=2) > -0.5
    found = []
    for library in (native.library, lambda: None):
        monkeypatch.setattr(gptq_module.native, "library", library)
        grid = mse_grid(w, bits=bits, group_size=32, symmetric=symmetric)
        result = gptq(w, x.T @ x / 600, grid=grid, mask=mask)
        found.append((grid.scale, quantize(w, grid), result.codes, result.error))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("size", [1, 16, 33, 128])
def test_learned_weights_and_their_gradients_are_those_of_autograd(size):
    """Straight through the rounding; half of the groups have negative scales."""
    weights, gradient = numbers(5, 4, size), numbers(5, 4, size, seed=1)
    offset = numbers(5, 4, size, seed=2).clamp(-1, 1).requires_grad_()
    scale = 0.2 + 0.1 * numbers(5, 4, seed=3).abs()
    scale = (scale * torch.tensor([1.0, -1.0]).repeat(10).view(5, 4)).requires_grad_()
    zero = torch.randint(0, 8, (5, 4), generator=torch.Generator().manual_seed(4)).float()

    x = weights / scale[..., None] + offset
    level = x + (x.round() - x).detach()
    level = level.clamp(-zero[..., None], 7 - zero[..., None])
    expected = level * scale[..., None]
    wanted = torch.autograd.grad(expected, [offset, scale], gradient)

    grid = (scale.detach(), zero, 7)
    found = learned_values(weights, offset.detach(), grid)
    torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=1e-6)
    back = learned_gradients(weights, offset.detach(), grid, gradient)
    torch.testing.assert_close(back, wanted, atol=1e-4, rtol=1e-4)


def test_a_learned_weight_that_is_not_a_number_stays_one():
    weights, offset = torch.ones(1, 1, 4), torch.zeros(1, 1, 4)
    offset[0, 0, 2] = float("nan")
    found = learned_values(weights, offset, (torch.ones(1, 1), torch.ones(1, 1), 3))
    assert found.isnan().flatten().tolist() == [False, False, True, False]


def test_learned_weights_that_do_not_fit_their_grid_are_refused():
    weights, one = torch.ones(2, 3, 4), torch.ones(2, 3)
    with pytest.raises(ValueError, match="do not fit"):
        learned_values(weights, weights, (torch.ones(2, 2), one, 3))
    with pytest.raises(ValueError, match="float32"):
        learned_values(weights.double(), weights, (one, one, 3))
