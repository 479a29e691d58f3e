"""What calibration leaves behind: second moments of the inputs of one linear layer.

    H = 1/n sum_t  x~_t x~_t^T               (the layer sees x~, made by the compressed prefix)
    D = 1/n sum_t  (x_t - x~_t) x~_t^T       (x is what the original model would have given)

H weighs rounding errors: the mean squared output error of dW is tr(dW H dW^T). D says how far the
input has drifted (see ``asymmetric.py``). Both are divided by the number of tokens, so neither the
batch size nor padding changes them.

H is symmetric, so only blocks on and above its diagonal are summed: little more than half the work.
Products are exact enough in fp32 and are never accumulated in 16 bit. Only the diagonals are
checked for NaN and infinity: H_jj = sum x~_j^2, D_jj = sum (x_j - x~_j) x~_j, so no bad value of a
column j can stay out of them.

What a layer of O < I outputs needs of D is only W D, [O, I]: with its original outputs y = W x,

    W D = 1/n sum_t  y_t x~_t^T  -  W H,

which costs O / I of the work. (The outputs are those of the original forward pass, less the bias.)

# T tokens, I in, O out
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.algorithms.finite import require_finite
from compressor.algorithms.products import add_products, by_feature

BLOCKS = 8  # of columns in which H is summed; (BLOCKS + 1) / (2 BLOCKS) of the work remains
SMALLEST_BLOCK = 128  # narrower products run slower than what they save


class HessianAccumulator:
    """Running sums of H and, if asked for, D over batches of calibration tokens.

    columns: I, the number of inputs of the layer. Memory: 4 I^2 bytes, twice that with D.
    """

    def __init__(
        self, columns: int, *, with_cross: bool, device: torch.device | str = "cpu"
    ) -> None:
        self.columns = columns
        self.num_tokens = 0
        self._hessian = torch.zeros(columns, columns, device=device)
        self._cross = torch.zeros_like(self._hessian) if with_cross else None

    def add(self, x_tilde: Tensor, x: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Count one batch: x_tilde and x [..., I] of the same shape, mask [...] True = real token.

        Returns the real tokens of x_tilde `by_feature`, fp32 [I, T], for sums beside this one.
        x is required exactly when D is wanted. Raises NumericError NU01 at the first batch with a
        non-finite input; the accumulator is then unusable.
        """
        if (x is None) != (self._cross is None):
            raise ValueError("x belongs to an accumulator made with_cross, and only to it")
        seen = _real_rows(x_tilde, mask, self._hessian.device)
        features = by_feature(seen)
        for begin, end in self._blocks():
            add_products(self._hessian[begin:end, begin:], features[begin:end], features[begin:])
        require_finite(self._hessian.diagonal(), "the inputs of a layer during calibration")
        if x is not None and self._cross is not None:
            drift = _real_rows(x, mask, self._hessian.device) - seen
            add_products(self._cross, by_feature(drift), features)
            require_finite(self._cross.diagonal(), "the original inputs of a layer")
        self.num_tokens += seen.shape[0]
        return features

    def merge(self, other: HessianAccumulator) -> None:
        """Count what another one of the same kind has counted, too."""
        self._hessian += other._hessian
        if self._cross is not None and other._cross is not None:
            self._cross += other._cross
        self.num_tokens += other.num_tokens

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """H and D (None without it), made in the memory of the sums: the accumulator is used up."""
        cross = None if self._cross is None else self._cross.div_(max(self.num_tokens, 1))
        self._mirror()
        hessian = self._hessian.div_(max(self.num_tokens, 1))
        self._hessian, self._cross = hessian.new_empty(0, 0), None
        return hessian, cross

    def hessian(self) -> Tensor:
        """H [I, I] in fp32; all zero (every column dead) if no token was seen."""
        self._mirror()
        return self._hessian / max(self.num_tokens, 1)

    def cross(self) -> Tensor:
        """D [I, I] in fp32; raises ValueError if the accumulator was made without it."""
        if self._cross is None:
            raise ValueError("this accumulator was made with with_cross=False")
        return self._cross / max(self.num_tokens, 1)

    def _blocks(self) -> list[tuple[int, int]]:
        width = max(SMALLEST_BLOCK, -(-self.columns // BLOCKS))
        return [(b, min(b + width, self.columns)) for b in range(0, self.columns, width)]

    def _mirror(self) -> None:
        """Copy the blocks above the diagonal below it."""
        for begin, end in self._blocks():
            self._hessian[end:, begin:end] = self._hessian[begin:end, end:].T


class OutputAccumulator:
    """Running sum of y x~^T, of which W D is made. Memory: 4 O I bytes."""

    def __init__(self, outputs: int, columns: int, *, device: torch.device | str = "cpu") -> None:
        self.num_tokens = 0
        self._sum = torch.zeros(outputs, columns, device=device)

    def add(self, y: Tensor, features: Tensor, mask: Tensor | None = None) -> None:
        """Count one batch: y [..., O] without bias, mask [...] True = real token.

        features [I, T] are x~ of the real tokens alone, as `HessianAccumulator.add` returns them.
        Raises NumericError NU01 for non-finite outputs.
        """
        theirs = _real_rows(y, mask, self._sum.device)
        require_finite(theirs, "the original outputs of a layer")
        add_products(self._sum, by_feature(theirs), features)
        self.num_tokens += len(theirs)

    def merge(self, other: OutputAccumulator) -> None:
        """Count what another one has counted, too."""
        self._sum += other._sum
        self.num_tokens += other.num_tokens

    def drift(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """W D [O, I] for the weight fp32 [O, I] and H of the same tokens, in the sum's memory."""
        return self._sum.div_(max(self.num_tokens, 1)).addmm_(weight, hessian, alpha=-1)


def _real_rows(x: Tensor, mask: Tensor | None, device: torch.device) -> Tensor:
    """Real tokens of x [..., F] as fp32 rows [T, F] on the device of a sum."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask is not None:
        rows = rows[mask.reshape(-1).to(rows.device)]
    return rows.to(device, torch.float32)
