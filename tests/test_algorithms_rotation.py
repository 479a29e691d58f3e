"""Rotations: orthogonal, reproducible, equal to their matrix, and good at spreading outliers."""

from __future__ import annotations

import pytest
import torch

from compressor.algorithms.rotation import Kind, hadamard_transform, make_rotation

SIZES = (1, 3, 4, 12, 64, 96, 172)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_rotations_are_orthogonal(kind: Kind, size: int) -> None:
    matrix = make_rotation(size, kind, seed=1).matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size).double(), atol=1e-12, rtol=0)


def test_the_fast_transform_is_the_matrix_of_sylvester() -> None:
    matrix = torch.ones(1, 1).double()
    for _ in range(4):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    x = torch.randn(5, 16).double()
    torch.testing.assert_close(hadamard_transform(x), x @ matrix / 4)
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x)), x)


def test_the_fast_transform_refuses_other_sizes() -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard_transform(torch.zeros(2, 12))


@pytest.mark.parametrize("size", [12, 64])
@pytest.mark.parametrize("keep_mean", [False, True])
def test_applying_is_multiplying_by_the_matrix(size: int, keep_mean: bool) -> None:
    rotation = make_rotation(size, "hadamard", seed=3, keep_mean=keep_mean)
    x = torch.randn(2, 7, size)
    torch.testing.assert_close(rotation.apply(x), (x.double() @ rotation.matrix()).float())


def test_a_seed_names_one_rotation() -> None:
    first, again, other = (make_rotation(48, "hadamard", seed=s).matrix() for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_the_mean_is_kept_on_request(kind: Kind) -> None:
    rotation = make_rotation(24, kind, seed=2, keep_mean=True)
    ones = torch.ones(24).double()
    torch.testing.assert_close(rotation.apply(ones), ones)
    norm = torch.nn.LayerNorm(24, elementwise_affine=False).double()
    x = torch.randn(3, 24).double()
    torch.testing.assert_close(norm(rotation.apply(x)), rotation.apply(norm(x)))


@pytest.mark.parametrize("size", [64, 96])
def test_an_outlier_is_spread_over_all_channels(size: int) -> None:
    x = torch.zeros(size)
    x[5] = 10.0
    spread = make_rotation(size, "hadamard", seed=4).apply(x)
    assert float(spread.abs().max()) < 10 / size**0.5 * 2
    assert bool((spread.abs() > 1e-6).all())
