"""Products by oneDNN: the same as torch's own, whatever the layout, and only where they pay."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.algorithms import products
from compressor.algorithms.hessian import HessianAccumulator, OutputAccumulator
from compressor_kernels import native

T, O, I = 384, 96, 160  # noqa: E741
CLOSE = 1e-6  # of the largest element; float32 sums of some hundred products


@pytest.fixture(params=["oneDNN", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who multiplies, whatever the processor and the size."""
    monkeypatch.setattr(products, "onednn_is_quicker", lambda: request.param == "oneDNN")
    monkeypatch.setattr(products, "SMALLEST", 0)
    return request.param


def _matrices(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == torch.float32
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max() / wanted.abs().max()) < CLOSE


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_is_the_product_in_float64_and_so_are_its_gradients(with_bias: bool) -> None:
    x, weight, bias, gradient = _matrices((3, 128, I), (O, I), (O,), (3, 128, O))
    leaves = [x, weight, bias] if with_bias else [x, weight]
    exact = [leaf.double().requires_grad_() for leaf in leaves]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    wanted, found = F.linear(*exact), products.linear(*leaves)
    _assert_close(found.detach(), wanted.detach())
    for mine, theirs in zip(
        torch.autograd.grad(found, leaves, gradient),
        torch.autograd.grad(wanted, exact, gradient.double()),
        strict=True,
    ):
        _assert_close(mine, theirs)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("which", ["columns", "rows", "transposed", "expanded"])
def test_linear_of_parts_of_wider_matrices(which: str) -> None:
    wide, weight = _matrices((2 * T, 2 * I), (2 * O, 2 * I))
    x, w = {
        "columns": (wide[:, 1 : 1 + I], weight[:, I:]),
        "rows": (wide[1::2, :I], weight[::2, :I].contiguous()),
        "transposed": (wide[:I].T, weight.T[:I].contiguous().T),
        "expanded": (wide[:1, :I].expand(T, I), weight[:, :I]),
    }[which]
    _assert_close(products.linear(x, w), F.linear(x.double(), w.double()))


@pytest.mark.usefixtures("library")
def test_only_what_is_asked_for_gets_a_gradient() -> None:
    x, weight = _matrices((T, I), (O, I))
    x.requires_grad_()
    products.linear(x, weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        assert not products.linear(x, weight).requires_grad


@pytest.mark.usefixtures("library")
def test_sums_over_tokens_are_those_in_float64() -> None:
    x, original, outputs = _matrices((T, 300), (T, 300), (T, O))
    sums, drift = HessianAccumulator(300, with_cross=True), OutputAccumulator(O, 300)
    for rows in (slice(0, 100), slice(100, T)):
        drift.add(outputs[rows], sums.add(x[rows], original[rows]))
    exact, weight = x.double(), torch.zeros(O, 300)
    hessian, cross = sums.finish()
    assert cross is not None
    _assert_close(hessian, exact.T @ exact / T)
    _assert_close(cross, (original.double() - exact).T @ exact / T)
    _assert_close(drift.drift(weight, hessian), outputs.double().T @ exact / T)


def _asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what goes to oneDNN from now on, wherever that is the quicker one."""
    shapes: list[tuple[int, ...]] = []
    product = products._onednn

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        shapes.append((*x.shape, len(weight)))
        return product(x, weight, bias)

    monkeypatch.setattr(products, "_onednn", noted)
    monkeypatch.setattr(products, "onednn_is_quicker", lambda: True)
    return shapes


def test_small_products_other_dtypes_and_autocast_stay_with_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = _asked(monkeypatch)
    small, large, weight = _matrices((4, I), (T, I), (O, I))
    products.linear(small, weight)
    products.linear(large.bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(large, weight).dtype == torch.bfloat16
    assert asked == []
    products.linear(large, weight)
    assert asked == [(T, I, O)]


@pytest.mark.parametrize(
    ("vendor", "capability", "quicker"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        ("", "AVX512", False),
    ],
)
def test_onednn_multiplies_where_mkl_leaves_avx512_out(
    vendor: str, capability: str, quicker: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        pytest.skip("this torch lacks one of the two libraries")
    monkeypatch.setattr(native, "processor", lambda: f"x86_64\nvendor_id : {vendor}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products.onednn_is_quicker.__wrapped__() is quicker
