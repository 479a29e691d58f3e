"""Muon: momentum whose update is made orthogonal (Jordan et al. 2024).

For a weight matrix the direction `M` (momentum of the gradient) is replaced by the nearest
matrix with all singular values close to 1, found by four Newton-Schulz steps

    X <- a X + (b A + c A A) X,   A = X X^T

`torch.optim.Muon` runs these steps in bfloat16, which many CPUs only emulate; here they run in
the dtype of the weights. In return all matrices of one shape are handled in one batched product.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch

_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: torch.Tensor, *, steps: int = 4) -> torch.Tensor:
    """Approximate `U V^T` of each matrix `U S V^T` in a stack [N, rows, columns]."""
    is_tall = matrices.size(1) > matrices.size(2)
    x: torch.Tensor = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum and orthogonal updates, for matrices only."""

    def __init__(
        self, params: Iterable[torch.nn.Parameter], *, lr: float, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient; `closure` is not supported."""
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape].append(weight)
            for weights in by_shape.values():
                self._update(weights, lr=group["lr"], momentum=group["momentum"])

    def _update(self, weights: list[torch.Tensor], *, lr: float, momentum: float) -> None:
        directions = []
        for weight in weights:
            state = self.state[weight]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(weight)
            buffer = state["momentum"]
            assert weight.grad is not None
            buffer.lerp_(weight.grad, 1 - momentum)
            directions.append(weight.grad.lerp(buffer, momentum))
        rows, columns = weights[0].shape
        scale = max(1.0, rows / columns) ** 0.5
        for weight, update in zip(weights, orthogonalize(torch.stack(directions)), strict=True):
            weight.add_(update, alpha=-lr * scale)
