"""Refit: a weight of few values and in blocks that changes the outputs of its layer least. Pure functions of tensors.

Notation of Frantar et al. 2023 (GPTQ, arXiv:2210.17323): a layer has outputs ``W x``, its inputs the second moments
``H = E[x x^T]``, and the error of a weight Q is ``tr((W - Q) H (W - Q)^T)``. Columns are settled one after another. The
error of a settled column is put onto the columns that are still free, with the weights that Optimal Brain Surgeon gives
them (Hassibi and Stork 1993, equation 5); the Cholesky factor of ``H^-1`` holds these weights for all columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muws.calibration.moments import DAMPING, energy
from lightning_muws.structure.cost import FINEST
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.support import Support, mean

PANEL = 128  # columns whose errors are collected before the columns behind them are updated (same, step 2)
SMOOTHING = 0.5  # added to each count of a histogram, so that no value costs infinitely much


@dataclass(frozen=True)
class Rate:
    """What the kinds of blocks and the precision of values cost in one weight.

    Args:
        step: Values are whole multiples of it.
        bit: What a bit costs in units of the layer's error; 0 rounds each value to the nearest.
        kinds: Bits that name a block's kind: dense, unified, pruned.
        magnitude: Bits of the magnitude of a unified block.
        shares_signs: Whether the weights of a unified block share their sign, which then costs nothing.
    """

    step: float
    bit: float = 0.0
    kinds: tuple[float, float, float] = (0.0, 0.0, 0.0)
    magnitude: float = 0.0
    shares_signs: bool = False


def inverse_factor(moments: Tensor, damping: float = DAMPING) -> Tensor:
    """Return the upper triangular ``U`` with ``U^T U = (H + damping * mean(diag(H)) I)^-1``.

    Args:
        moments: ``(groups, n, n)`` symmetric, positive semidefinite.
        damping: In shares of the mean of the diagonal.

    Returns:
        ``(groups, n, n)``, same dtype. ``1 / U[i, i]^2`` is what an error of 1 in column i costs when the columns
        behind it are refitted.

    Example:
        >>> inverse_factor(4 * torch.eye(2)[None], damping=0.0)
        tensor([[[0.5000, 0.0000],
                 [0.0000, 0.5000]]])
    """
    n = moments.shape[-1]
    mean = moments.diagonal(dim1=1, dim2=2).mean(1)
    ridge = torch.where(mean > 0, damping * mean, torch.ones_like(mean))
    damped = moments + ridge[:, None, None] * torch.eye(n, dtype=moments.dtype, device=moments.device)
    # with the columns in reverse order, H = L L^T gives H^-1 = L^-T L^-1, whose factor L^-1 is upper when turned back
    lower = torch.linalg.cholesky(damped.flip(1, 2))
    eye = torch.eye(n, dtype=moments.dtype, device=moments.device).expand_as(lower)
    factor: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False).flip(1, 2)
    return factor


def column_order(moments: Tensor, cols: int, n_free: int = 0) -> Tensor:
    """Return the order in which columns are settled: those with the largest inputs first, blocks of columns together.

    Columns that come late take the errors of all others, so the ones that matter least are last (Frantar et al. 2023,
    "act-order").

    Args:
        moments: ``(groups, n, n)``.
        cols: Columns of a block.
        n_free: Columns at the end that stay there.

    Returns:
        ``(n,)`` int64; all whole blocks come before the columns that no block covers.

    Example:
        >>> column_order(torch.diag(torch.tensor([1.0, 1.0, 2.0, 3.0, 9.0]))[None], cols=2).tolist()
        [2, 3, 0, 1, 4]
    """
    n = moments.shape[-1] - n_free
    at = torch.arange(n + n_free, device=moments.device)
    covered = n // cols * cols
    energy = moments.diagonal(dim1=1, dim2=2).sum(0)[:covered].view(-1, cols).sum(1)
    ranked = energy.argsort(descending=True, stable=True)
    return torch.cat([at[:covered].view(-1, cols)[ranked].flatten(), at[covered:]])


def refit(
    weight: Tensor,
    moments: Tensor,
    rate: Rate,
    grid: BlockGrid | None = None,
    kinds: Tensor | None = None,
    n_free: int = 0,
    damping: float = DAMPING,
) -> Tensor:
    """Return the weight on the grid of values and blocks, each column's error put onto the columns behind it.

    Args:
        weight: ``(out, n)`` float32 or float64, the matrix view of the layer's weight.
        moments: ``(groups, n, n)`` of the same dtype: ``E[x x^T]`` of the inputs of each group of outputs.
        rate: The step, and what bits cost.
        grid: Whose blocks may be unified and pruned; None for none.
        kinds: ``(down, across)`` uint8, the :class:`Kind` of each block; None chooses the cheapest ones.
        n_free: Columns at the end that are settled last and take any value, such as a bias with inputs of 1.
        damping: See :func:`inverse_factor`.

    Returns:
        Same shape and dtype; all columns but the last ``n_free`` are multiples of the step. If bits cost
        nothing and the nearest such weight has a smaller error, that one.

    Example:
        >>> weight = torch.tensor([[0.6, 1.2]])
        >>> refit(weight, torch.eye(2)[None], Rate(step=1.0))  # inputs without correlation: to the nearest
        tensor([[1., 1.]])
        >>> refit(weight, torch.tensor([[[1.0, 0.9], [0.9, 1.0]]]), Rate(step=1.0))  # 0.4 too much, 0.2 too little
        tensor([[1., 1.]])
    """
    cols = grid.block_shape[1] if grid else 1
    order = column_order(moments, cols, n_free)
    factor = inverse_factor(moments[:, order][:, :, order].to(torch.float64), damping).to(weight)
    task = _Task(weight, factor, rate, grid)
    fixed = None if kinds is None else kinds[:, order[: kinds.shape[1] * cols : cols] // cols]
    settled = task.run(weight[:, order], fixed, n_free)
    found = torch.empty_like(settled)
    found[:, order] = settled
    found.add_(0.0)  # -0.0 + 0.0 is 0.0: a sign on zero would be a bit of the file
    if rate.bit:
        return found
    n, flat = weight.shape[1] - n_free, grid and BlockGrid(grid.block_shape)
    plain = torch.cat([nearest(weight[:, :n], rate.step, flat, kinds, rate.shares_signs), weight[:, n:]], 1)
    # columns are settled greedily, which now and then is worse
    return min(found, plain, key=lambda q: energy(weight - q, moments))


class _Task:
    """What the columns of one weight have in common while they are settled."""

    def __init__(self, weight: Tensor, factor: Tensor, rate: Rate, grid: BlockGrid | None) -> None:
        self.factor, self.rate, self.grid = factor, rate, grid
        self.groups, n_out = len(factor), len(weight)
        self.shape = self.groups, n_out // self.groups
        self.bits = self._bits(weight)

    def _bits(self, weight: Tensor) -> Tensor:
        """Return the bits of each number of steps, ``(most + 1,)``, if each value were rounded by itself."""
        steps = (weight / self.rate.step).abs().round_().clamp_max_(FINEST - 1)
        most = min(2 * int(steps.max()) + 2, FINEST - 1) if steps.numel() else 1  # errors of other columns are added
        bits = _code_lengths(steps, most)
        if not self.rate.bit:
            return bits
        cost = 1 / self.factor.diagonal(dim1=1, dim2=2).square()  # of an error of 1, by group and column
        scale = cost[:, None, :]
        for _ in range(2):  # zeros become cheaper, so that there are more of them
            nearest = self._steps(weight.view(*self.shape, -1), scale, bits)
            bits = _code_lengths(nearest.abs(), most)
        return bits

    def _steps(self, x: Tensor, scale: Tensor, bits: Tensor) -> Tensor:
        """Return the whole numbers of steps that are cheapest in error and bits, with the sign of x."""
        a = x.abs() / self.rate.step
        nearest = a.round().clamp_max_(len(bits) - 1)
        if self.rate.bit:
            price = scale * (self.rate.step**2 / self.rate.bit)
            best, least = nearest, price * (a - nearest).square() + bits[nearest.long()]
            for other in ((nearest - 1).clamp_min_(0), torch.zeros_like(nearest)):
                cost = price * (a - other).square() + bits[other.long()]
                best, least = torch.where(cost < least, other, best), torch.minimum(cost, least)
            nearest = best
        return torch.copysign(nearest, x)

    def run(self, weight: Tensor, kinds: Tensor | None, n_free: int) -> Tensor:
        """Return the settled weight, its columns in the order of the factor; see :func:`refit`."""
        rows, cols = self.grid.block_shape if self.grid else (1, 1)
        w, n = weight.reshape(*self.shape, -1).clone(), weight.shape[1] - n_free
        covered = n // cols * cols if self.grid and len(weight) >= rows else 0
        pieces = [*range(0, covered, cols), *range(covered, n), n]
        first = 0
        while first < len(pieces) - 1:
            last = first + 1
            while last < len(pieces) - 1 and pieces[last] - pieces[first] < PANEL:
                last += 1
            panel = slice(pieces[first], pieces[last])
            errors = torch.zeros_like(w[..., panel])
            for start, stop in zip(pieces[first:last], pieces[first + 1 : last + 1], strict=True):
                here, behind = slice(start, stop), slice(stop, panel.stop)
                factor = self.factor[:, here, here]
                given = kinds[:, start // cols] if kinds is not None and start < covered else None
                settled = self._settle(w[..., here], factor, given, start < covered)
                error = _solve(w[..., here] - settled, factor)
                w[..., here] = settled
                w[..., behind] -= error @ self.factor[:, here, behind]
                errors[..., start - panel.start : stop - panel.start] = error
            w[..., panel.stop :] -= errors @ self.factor[:, panel, panel.stop :]
            first = last
        return w.view(weight.shape)

    def _settle(self, w: Tensor, factor: Tensor, kinds: Tensor | None, is_cut: bool) -> Tensor:
        """Return the values of some columns ``(groups, out, cols)``."""
        rest, steps, errors = w.clone(), torch.empty_like(w), torch.empty_like(w)
        for j in range(w.shape[2]):
            own = factor[:, j, j].view(-1, 1)
            steps[..., j] = self._steps(rest[..., j], 1 / own.square(), self.bits)
            errors[..., j] = (rest[..., j] - steps[..., j] * self.rate.step) / own
            rest[..., j + 1 :] -= errors[..., j, None] * factor[:, None, j, j + 1 :]
        dense = steps * self.rate.step
        if not is_cut or self.grid is None or (kinds is None and not self.rate.bit):
            return dense
        return self._choose(w, factor, dense, steps, errors, kinds)

    def _choose(
        self, w: Tensor, factor: Tensor, dense: Tensor, steps: Tensor, errors: Tensor, kinds: Tensor | None
    ) -> Tensor:
        """Return the values of a column of blocks, each of the cheapest kind, or of the given one."""
        assert self.grid is not None  # noqa: S101  only cut columns come here
        rows, cols = self.grid.block_shape
        down, rate = w.shape[0] * w.shape[1] // rows, self.rate

        def blocks(x: Tensor) -> Tensor:
            return x.reshape(-1, cols)[: down * rows].reshape(down, rows * cols)

        signs = torch.ones_like(w) if rate.shares_signs else torch.where(w < 0, -1.0, 1.0).to(w)
        target, along = blocks(_solve(w, factor)), blocks(_solve(signs, factor))
        product, square = (along * target).sum(1), along.square().sum(1)
        magnitude = product / square.clamp_min(torch.finfo(w.dtype).tiny)
        least = magnitude.sign() if rate.shares_signs else torch.ones_like(magnitude)
        count = (magnitude / rate.step).round().clamp(-(FINEST - 1), FINEST - 1)
        count = torch.where(count * least < 1, least, count)
        magnitude = count * rate.step
        if kinds is None:
            bit = rate.bit
            costs = [
                blocks(errors).square().sum(1) + bit * self.bits[blocks(steps).abs().long()].sum(1),
                (target - magnitude[:, None] * along).square().sum(1)
                + bit * (rate.magnitude + (0 if rate.shares_signs else rows * cols)),
                target.square().sum(1),
            ]
            kinds = torch.stack([c + bit * k for c, k in zip(costs, rate.kinds, strict=True)]).argmin(0)
        kinds = kinds.long()[:, None]
        found = torch.where(kinds == Kind.UNIFIED, magnitude[:, None] * blocks(signs), blocks(dense))
        found = torch.where(kinds == Kind.PRUNED, torch.zeros_like(found), found)
        settled = dense.reshape(-1, cols).clone()
        settled[: down * rows] = found.reshape(-1, cols)
        return settled.view(w.shape)


def _solve(x: Tensor, factor: Tensor) -> Tensor:
    """Return ``x U^-1`` for the upper triangular part U of a factor that belongs to some columns."""
    solved: Tensor = torch.linalg.solve_triangular(factor, x, upper=True, left=False)
    return solved


def _code_lengths(steps: Tensor, most: int) -> Tensor:
    """Return the bits of each number of steps from 0 to ``most``, the sign included, from how often each occurs."""
    counts = steps.flatten().long().clamp_max_(most).bincount(minlength=most + 1).to(steps.dtype)
    likely = (counts + SMOOTHING) / (counts + SMOOTHING).sum()
    bits = -likely.log2()
    bits[1:] += 1
    return bits.cummax(0).values


def nearest(weight: Tensor, step: float, grid: BlockGrid | None, kinds: Tensor | None, shares_signs: bool) -> Tensor:
    """Return the nearest weight of multiples of a step, with blocks of these kinds.

    Args:
        weight: Any shape, a floating dtype.
        step: In units of the weight; 0 leaves values as they are.
        grid: How it is cut; None for no blocks.
        kinds: ``(down, across)`` uint8, the :class:`Kind` of each block.
        shares_signs: Whether the weights of a unified block are one value.

    Example:
        >>> nearest(torch.tensor([0.6, 1.2]), 0.5, None, None, False)
        tensor([0.5000, 1.0000])
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    found = _multiples(wide, step)
    if grid is not None and kinds is not None and kinds.numel():
        support = Support(grid, kinds, kinds.new_empty(0, dtype=torch.bool))
        blocks = list(support.unified_blocks(wide))
        magnitudes = wide.new_empty(0)
        if blocks:
            x = torch.cat(blocks, 1)
            if not shares_signs:
                support, x = Support(grid, kinds, x.signbit()), x.abs()
            means = mean(x.clone)
            magnitudes = _multiples(means, step)
            if step:  # a unified block does not become zero
                magnitudes = torch.where(magnitudes == 0, torch.where(means < 0, -step, step).to(wide), magnitudes)
        found = support.place_(found, magnitudes)
    return found.to(weight.dtype)


def _multiples(x: Tensor, step: float) -> Tensor:
    return (x / step).round_().clamp_(1 - FINEST, FINEST - 1).mul_(step).add_(0.0) if step else x.clone()
