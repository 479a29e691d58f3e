"""GPTQ: round the columns one after another, and let the later ones repair the error.

For one layer with inputs x and H = E[x x^T], the mean squared output error of rounding W to W^ is

    tr((W^ - W) H (W^ - W)^T).

With H = R R^T (R upper triangular) that is || (W^ - W) R ||^2, and column j of (W^ - W) R holds
only errors of columns 1..j. The greedy solution makes them small one after another:

    c_j = w_j + sum_{i<j} (w_i - w^_i) R_ij / R_jj,        w^_j = round c_j on its grid.

These are the codes of Frantar et al. 2022 ("GPTQ", section 3.3), there found from the Cholesky
factor of H^-1, and of LDLQ (Chee et al. 2023, "QuIP", theorem 6 shows that both are one); this way
no inverse is needed, and the error comes for nothing: sum_j R_jj^2 |c_j - w^_j|^2.

Choices made here, each measured in the project's notes:

* columns are visited in order of falling H_jj ("act-order"), while every group keeps its original
  columns and a grid fixed beforehand ("static groups"), so nothing but codes reaches the file;
* R comes from one Cholesky factorisation of H with rows and columns reversed: if J is the reversal,
  J H J = L L^T, then R = J L J;
* a column that no calibration token touched (H_jj = 0) keeps its value and is rounded to nearest;
* masked (pruned) weights are forced to the zero point, and their error is repaired as well.

# O out, I in, B columns per block
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.algorithms.finite import require_finite
from compressor.algorithms.grid import Grid, Levels, group_width
from compressor_kernels import native
from compressor_kernels.native_rounding import MOST_COLUMNS, UniformLevels, round_columns

MAX_RETRIES = 3  # times the dampening is raised tenfold
EIGENVALUE_FLOOR = 1e-6  # of the largest eigenvalue
DAMPENING_CEILING = 1.0
ROWS_AT_ONCE = 2048  # bounds temporaries; larger blocks are no faster
PANEL = 512  # columns, several blocks; 256 and 1024 are slower


@dataclass(frozen=True, slots=True)
class Factor:
    """How H was factorised; quality moves towards round-to-nearest as dampening grows.

    dampening_used: multiple of mean(diag H) added to the diagonal, 0 for a diagonal fallback.
    attempts: factorisations tried, 1 if the first succeeded.
    reason: empty, or one sentence that says what had to be done instead.
    """

    dampening_used: float
    attempts: int
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class GptqResult:
    """Codes and their cost.

    codes: uint8 [O, I]. error: tr(dW H dW^T) with H as factorised, less the part of the dampening.
    num_dead: columns without input. num_saturated: codes that wanted to lie outside the grid and
    were clamped.
    """

    codes: Tensor
    error: float
    num_dead: int
    num_saturated: int
    factor: Factor


def hessian_error(delta_w: Tensor, hessian: Tensor) -> float:
    """tr(dW H dW^T): mean squared output error per token, summed over rows. dW [O, I], H [I, I]."""
    dtype = torch.promote_types(delta_w.dtype, torch.float32)
    weight, total = hessian.to(dtype), 0.0
    for rows in torch.split(delta_w, ROWS_AT_ONCE):
        delta = rows.to(dtype)
        total += float((delta @ weight).mul_(delta).sum(dtype=torch.float64))
    return total


def cholesky_factor(
    hessian: Tensor, *, dampening: float, order: Tensor | None = None
) -> tuple[Tensor, Factor]:
    """R [I, I], upper triangular, with H + dampening * mean(diag H) * I = R R^T.

    order: factorise H[order][:, order] instead, without a lasting copy of it.

    If the factorisation fails: once more in fp64, then up to three times with tenfold dampening,
    then with clamped eigenvalues, at last with diag(H) alone. The ``Factor`` says which. Memory: at
    most two I x I matrices besides H (in fp64 after the first attempt). Raises NumericError NU01
    if H is not finite; that is a broken input and no dampening can repair it.
    """
    require_finite(hessian, "the input statistics (Hessian) of a layer")
    dtype = torch.promote_types(hessian.dtype, torch.float32)
    attempts = 0
    for attempts, (lam, precision, reason) in enumerate(_ladder(dampening, dtype), start=1):
        upper = _factor(_damped(hessian, lam, precision, order))
        if upper is not None:
            return upper.to(dtype), Factor(lam, attempts, reason)
    clamped = _clamp_eigenvalues(hessian, order)
    upper = None if clamped is None else _factor(clamped)
    if upper is not None:
        reason = "not positive definite at any dampening: small eigenvalues were raised"
        return upper.to(dtype), Factor(0.0, attempts + 1, reason)
    diagonal = hessian.diagonal().to(dtype).clamp(min=0)
    diagonal = diagonal if order is None else diagonal[order]
    floor = diagonal.max() * EIGENVALUE_FLOOR
    safe = torch.where(diagonal > floor, diagonal, floor if bool(floor > 0) else diagonal + 1)
    reason = "no factorisation succeeded: only the diagonal was used (round to nearest)"
    return torch.diag(safe.sqrt()), Factor(0.0, attempts + 2, reason)


def times_inverse(left: Tensor, root: Tensor) -> Tensor:
    """left (R R^T)^-1 [n, I] for left [n, I] and R [I, I] of `cholesky_factor`."""
    half = torch.linalg.solve_triangular(root.T, left, upper=False, left=False)
    found: Tensor = torch.linalg.solve_triangular(root, half, upper=True, left=False)
    return found


def inverse_cholesky(hessian: Tensor, *, dampening: float) -> tuple[Tensor, Factor]:
    """U = R^-1 [I, I] of `cholesky_factor`: (H + dampening * mean(diag H) * I)^-1 = U^T U."""
    root, factor = cholesky_factor(hessian, dampening=dampening)
    inverse = torch.eye(len(root), dtype=root.dtype, device=root.device).mT
    torch.linalg.solve_triangular(root, inverse, upper=True, out=inverse)
    return inverse, factor


def gptq(
    w: Tensor,
    hessian: Tensor,
    *,
    grid: Levels,
    dampening: float = 0.01,
    mask: Tensor | None = None,
    columns_per_block: int = 128,
) -> GptqResult:
    """Round w [O, I] onto the fixed grid so that the error weighted with H [I, I] is small.

    mask: bool [O, I], True = keep; all other codes become the zero point (an exact 0). The order of
    columns, ties included, depends on H alone, so equal inputs give equal codes. Raises
    NumericError NU01 for non-finite w or H, RecipeError CK29 if groups do not tile the columns.
    """
    require_finite(w, "the weights to be quantized")
    alive, num_dead = _revive(hessian)
    order = torch.argsort(alive.diagonal(), descending=True, stable=True)
    root, factor = cholesky_factor(alive, dampening=dampening, order=order)
    added = alive.diagonal() - hessian.diagonal()  # what was factorised beyond H: dead columns
    added = added + factor.dampening_used * alive.diagonal().mean()
    del alive
    columns = _Columns(w, order, grid, mask, dtype=root.dtype)
    error = _sweep(columns, root, columns_per_block) - columns.square_error(added[order])
    del root
    codes, num_saturated = columns.codes.T.contiguous(), int(columns.num_saturated.sum())
    return GptqResult(codes, max(0.0, error), num_dead, num_saturated, factor)


def _ladder(dampening: float, dtype: torch.dtype) -> Iterator[tuple[float, torch.dtype, str]]:
    """Dampening, precision and explanation of each attempt."""
    yield dampening, dtype, ""
    yield dampening, torch.float64, "not positive definite in fp32: factorised in fp64"
    lam = dampening
    for _ in range(MAX_RETRIES):
        lam = min(max(lam * 10, 1e-4), max(DAMPENING_CEILING, dampening))
        yield lam, torch.float64, f"not positive definite: dampening raised to {lam:g}"


def _in_order(hessian: Tensor, order: Tensor) -> Tensor:
    """H[order][:, order], some rows at a time: rows are copied, columns gathered while cached."""
    found = torch.empty_like(hessian)
    for rows, out in zip(torch.split(order, 256), torch.split(found, 256), strict=True):
        chosen = hessian.index_select(0, rows)
        torch.gather(chosen, 1, order.expand_as(chosen), out=out)
    return found


def _damped(hessian: Tensor, dampening: float, dtype: torch.dtype, order: Tensor | None) -> Tensor:
    """A copy of H, reversed in rows and columns, with dampening on its diagonal."""
    flipped = hessian.flip(0, 1) if order is None else _in_order(hessian, order.flip(0))
    flipped = flipped.to(dtype)
    flipped.diagonal().add_(dampening * flipped.diagonal().mean())
    return flipped


def _factor(flipped: Tensor) -> Tensor | None:
    """R = J L J of the reversed matrix J H J = L L^T; None if it is not positive definite."""
    lower = flipped.mT  # column-major, so that the factorisation works in place
    del flipped
    info = torch.zeros((), dtype=torch.int32, device=lower.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    if int(info) != 0 or not bool(torch.isfinite(lower.diagonal()).all()):
        return None
    return lower.flip(0, 1)


def _clamp_eigenvalues(hessian: Tensor, order: Tensor | None) -> Tensor | None:
    """H, reversed, with eigenvalues raised to a floor; None if they cannot be had."""
    try:
        values, vectors = torch.linalg.eigh(_damped(hessian, 0.0, torch.float64, order))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # no convergence
        return None
    if not bool(values[-1] > 0):
        return None
    raised = vectors * values.clamp(min=float(values[-1]) * EIGENVALUE_FLOOR)
    return torch.mm(raised, vectors.T)


def _revive(hessian: Tensor) -> tuple[Tensor, int]:
    """H whose dead columns carry the mean diagonal, uncorrelated (a copy if there are any)."""
    alive = hessian.to(torch.promote_types(hessian.dtype, torch.float32))
    dead = alive.diagonal() <= 0
    num_dead = int(dead.sum())
    if num_dead:
        alive = alive.clone() if alive is hessian else alive
        diagonal = alive.diagonal()
        alive[dead, :] = 0
        alive[:, dead] = 0
        mean = float(diagonal.mean())
        diagonal[dead] = mean if mean > 0 else 1.0
    return alive, num_dead


def _sweep(columns: _Columns, root: Tensor, block: int) -> float:
    """Round all columns in visiting order; returns || (W^ - W) R ||^2.

    Each block first takes what the errors of all blocks before it mean for its columns. What comes
    from before a whole panel of blocks is one large product instead of many small ones.
    """
    total, count = 0.0, len(columns.position)
    for left in range(0, count, PANEL):
        right = min(left + PANEL, count)
        diagonal = root.diagonal()[left:right]
        panel = root[:right, left:right] / diagonal
        waiting = panel[:left].T @ columns.weights[:left]
        for begin in range(left, right, block):
            end = min(begin + block, right)
            here = slice(begin - left, end - left)
            before = waiting[here].addmm_(panel[left:begin, here].T, columns.weights[left:begin])
            misses = columns.round(begin, end, before, panel[begin:end, here])
            squares = misses.square().sum(1).double()
            total += float((squares * diagonal[here].double().square()).sum())
    return total


class _Columns:
    """Columns of one layer in visiting order, with the grid, mask and codes that belong to them.

    Weights and codes lie transposed, [I, O], so that one column is one contiguous row; codes are in
    the original order of columns. A column that is rounded is replaced by its error w - w^.
    """

    def __init__(
        self, w: Tensor, order: Tensor, grid: Levels, mask: Tensor | None, *, dtype: torch.dtype
    ) -> None:
        self.width = group_width(w.shape[1], grid.group_size)
        self.position: list[int] = order.cpu().tolist()  # original column of each visited one
        self.weights = w.T.to(dtype).contiguous()[order]
        self.keep = None if mask is None else mask.T[order]
        self.scale = grid.scale.T.to(dtype).contiguous()  # [G, O]
        self.zero = grid.zero_point.T.to(dtype).contiguous()
        self.grid = grid
        self.codes = torch.empty(w.shape[1], w.shape[0], dtype=torch.uint8, device=w.device)
        self.num_saturated = torch.zeros(w.shape[0], dtype=torch.int32, device=w.device)
        uniform = isinstance(grid, Grid) and dtype == torch.float32 and w.device.type == "cpu"
        self.native = uniform and native.library() is not None

    def round(self, begin: int, end: int, before: Tensor, inside: Tensor) -> Tensor:
        """Round a block of columns, one after another; gives what was rounded less w^ [B, O].

        before: [B, O], what the errors of all blocks before mean for these columns; inside [B, B]:
        what their own errors mean for those behind them.
        """
        if self.native and end - begin <= MOST_COLUMNS:
            return self._round_natively(begin, end, before, inside)
        misses = torch.empty_like(before)
        for row in range(begin, end):
            at = row - begin
            wanted = self.weights[row] + before[at]
            if at:  # errors of this block, applied only when the column's turn comes
                wanted = wanted.addmv_(self.weights[begin:row].T, inside[:at, at])
            misses[at] = self._round_one(row, wanted)
        return misses

    def _round_natively(self, begin: int, end: int, before: Tensor, inside: Tensor) -> Tensor:
        assert isinstance(self.grid, Grid), "`native` says so"
        position = torch.tensor(self.position[begin:end])
        group, top = position // self.width, self.grid.num_levels - 1
        levels = UniformLevels(self.scale, self.zero, group, top)
        keep = None if self.keep is None else self.keep[begin:end]
        block = self.weights[begin:end]
        misses, codes, outside = round_columns(block, before, inside.contiguous(), levels, keep)
        self.codes[position] = codes
        self.num_saturated += outside
        return misses

    def _round_one(self, row: int, wanted: Tensor) -> Tensor:
        """Store the codes nearest to `wanted` [O] for one column; returns wanted - w^."""
        original = self.position[row]
        scale, zero = self.scale[original // self.width], self.zero[original // self.width]
        kept = wanted if self.keep is None else torch.where(self.keep[row], wanted, 0.0)
        code, level, outside = self.grid.nearest(kept / scale, zero)
        self.num_saturated += outside
        self.codes[original] = code
        rounded = level * scale
        self.weights[row] -= rounded
        return wanted - rounded

    def square_error(self, weight: Tensor) -> float:
        """sum_j weight_j |w_j - w^_j|^2 after all columns are rounded."""
        squares = self.weights.square().sum(1).double()
        return float((squares * weight.to(squares)).sum())
