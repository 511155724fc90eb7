"""Choose which blocks to prune and which to unify from their costs, by Lagrangian relaxation with one multiplier.

The problem assigns n blocks to three kinds with given counts: a transportation problem, whose linear relaxation has
integral solutions (Schrijver 2003, chapter 21). So relaxing the number of pruned blocks (Everett 1963; Fisher 1981)
leaves no duality gap, and a search in one dimension finds the multiplier. Order statistics of a sample bracket those of
all blocks first (Floyd and Rivest 1975). The constants change the time, not the result.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_muws.structure.kinds import Kind

# Times are of `cheapest` on one CPU core, normal weights in blocks of 16, half of them pruned and a quarter unified.
SAMPLE_ABOVE = 1 << 12  # with fewer blocks a sample costs what it saves; with 65,536 it takes 4 ms instead of 25
GALLOP = 1.2  # factor on the multiplier until it is too large; 1.05 to 1.5 take the same time, 2 takes longer
SAMPLE_STRIDE = 17  # 37 and 101 take the same time, 5 takes twice as long; prime, so that it visits all columns


def smallest(costs: Tensor, k: int) -> Tensor:
    """Return the mask of the ``k`` smallest costs; among equal ones the earliest, on every device and rerun.

    Args:
        costs: ``(n,)``, any dtype without NaN.
        k: How many, from 0 to n.

    Returns:
        ``(n,)`` bool with exactly ``k`` times True.

    Example:
        >>> smallest(torch.tensor([2.0, 1.0, 2.0, 2.0]), 2)
        tensor([ True,  True, False, False])
    """
    if k <= 0 or k >= len(costs):
        return torch.full_like(costs, k > 0, dtype=torch.bool)
    # A stable sort gives the same and takes ten times longer; topk breaks ties in no defined order.
    threshold = kth(costs, k)
    mask = costs <= threshold
    if (excess := count(mask) - k) > 0:
        ties = costs == threshold
        mask &= ~ties | (ties.cumsum(0) <= ties.sum() - excess)
    return mask


def kth(x: Tensor, k: int) -> Tensor:
    """Return the ``k``-th smallest of ``(n,)`` values, a scalar.

    Example:
        >>> kth(torch.tensor([3.0, 1.0, 2.0]), 2)
        tensor(2.)
    """
    if len(x) >= SAMPLE_ABOVE:
        some = x[::SAMPLE_STRIDE].contiguous()
        share = k / len(x)
        margin = 1 + 4 * math.sqrt(share * (1 - share) * len(some))  # four standard deviations of the sample's rank
        low = some.kthvalue(max(1, math.floor(share * len(some) - margin))).values
        high = some.kthvalue(min(len(some), math.ceil(share * len(some) + margin))).values
        below, inside = count(x < low), x[(x >= low) & (x <= high)]
        if below < k <= below + len(inside):
            return inside.kthvalue(k - below).values
    return x.kthvalue(k).values


def count(mask: Tensor) -> int:
    """Return how often a mask is True; int32 sums are three times as fast as the default int64 ones."""
    return int(mask.sum(dtype=torch.int32))


def cheapest(unify_cost: Tensor, gain: Tensor, n_pruned: int, n_unified: int) -> tuple[Tensor, Tensor]:
    """Return which blocks to prune and which to unify so that the sum of their costs is least.

    Unifying block b costs ``unify_cost[b]``, pruning it ``unify_cost[b] + gain[b]``, with ``gain >= 0``. The Lagrangian
    in the number of pruned blocks has one multiplier d: a block costs ``unify_cost + min(gain - d, 0)``, the cheapest
    blocks are taken, and those of them with ``gain < d`` are pruned. Bisection finds the d with the right number of
    pruned blocks. If that number jumps past the right one at some d, the choices on both sides of it are optimal, and a
    mixture of them has the right number.

    Args:
        unify_cost: ``(n,)`` floating, finite.
        gain: ``(n,)``, same dtype: what pruning costs more than unifying.
        n_pruned: How many blocks to prune.
        n_unified: How many other blocks to unify.

    Returns:
        Two bool masks ``(n,)``, disjoint, with exactly ``n_pruned`` and ``n_unified`` times True.
    """
    if n_pruned == 0:
        return torch.zeros_like(gain, dtype=torch.bool), smallest(unify_cost, n_unified)
    if n_unified == 0:
        return smallest(unify_cost + gain, n_pruned), torch.zeros_like(gain, dtype=torch.bool)
    if n_pruned + n_unified == len(gain):
        pruned = smallest(gain, n_pruned)
        return pruned, ~pruned
    return _joint(unify_cost, gain, n_pruned, n_pruned + n_unified)


def _joint(unify_cost: Tensor, gain: Tensor, n_pruned: int, total: int) -> tuple[Tensor, Tensor]:
    low, high = _bracket(unify_cost, gain, n_pruned, total)
    # A block's discounted cost falls as d grows, and so does the largest cost taken. So some blocks are taken, with the
    # same kind, at every d of the bracket, and others at none: only the rest, which are few, need the search.
    prunes, unifies = gain < low.d, gain >= high.d
    settled_in = (low.costs < high.largest) & (prunes | unifies)
    unsettled = (~(settled_in | (high.costs > low.largest))).nonzero().squeeze(1)
    pruned, unified = settled_in & prunes, settled_in & unifies
    some_costs, some_gain = unify_cost[unsettled], gain[unsettled]
    n_pruned, total = n_pruned - count(pruned), total - count(settled_in)
    lowest, highest = _bisect(some_costs, some_gain, n_pruned, total, low.d, high.d)
    taken = _mixed(some_costs, some_gain, n_pruned, total, lowest, highest)
    some_pruned = smallest(torch.where(taken, some_gain, torch.inf), n_pruned)
    pruned[unsettled], unified[unsettled] = some_pruned, taken & ~some_pruned
    return pruned, unified


class _Level(NamedTuple):
    """The costs of all blocks at one multiplier d, and the largest cost that is taken."""

    d: Tensor
    costs: Tensor
    largest: Tensor


def _level(unify_cost: Tensor, gain: Tensor, total: int, d: Tensor) -> _Level:
    costs = _discounted(unify_cost, gain, d)
    return _Level(d, costs, kth(costs, total))


def _discounted(unify_cost: Tensor, gain: Tensor, d: Tensor) -> Tensor:
    return unify_cost + (gain - d).clamp_max_(0)


def _count(unify_cost: Tensor, gain: Tensor, total: int, d: Tensor) -> tuple[int, Tensor]:
    """Return how many of the ``total`` blocks that are cheapest at multiplier d would be pruned, and their mask."""
    taken = smallest(_discounted(unify_cost, gain, d), total)
    return count(taken & (gain < d)), taken


def _bisect(
    unify_cost: Tensor, gain: Tensor, n_pruned: int, total: int, low: Tensor, high: Tensor, slack: float = 0
) -> tuple[Tensor, Tensor]:
    """Narrow ``low <= d <= high`` to two neighbouring floats, or to one d (twice) whose count is within the slack.

    Bisection alternates with interpolation in the counts (regula falsi), once a count above the right one is known.
    """
    if n_pruned:  # fewer than that many gains are less than this
        low = torch.maximum(low, kth(gain, n_pruned))
    n_low, n_high, halve = n_pruned // 2, 0, False  # n_low is a guess, n_high is not known yet
    while low < (middle := low + (high - low) / 2) < high:
        if not halve:  # step up until the count is passed, then interpolate
            guess = low + (high - low) * ((n_pruned - n_low) / (n_high - n_low)) if n_high else low * GALLOP
            middle = guess if low < guess < high else middle
        halve = not halve and n_high > 0
        n, _ = _count(unify_cost, gain, total, middle)
        if abs(n - n_pruned) <= slack:
            return middle, middle
        if n < n_pruned:
            low, n_low = middle, n
        else:
            high, n_high = middle, n
    return low, high


def _bracket(unify_cost: Tensor, gain: Tensor, n_pruned: int, total: int) -> tuple[_Level, _Level]:
    """Return the levels of two multipliers that prune at most, and at least, ``n_pruned`` blocks."""
    bottom, top = gain.new_zeros(()), gain.max() * 2 + torch.finfo(gain.dtype).tiny
    lows, highs = [], []  # candidates, the best last
    if len(gain) >= SAMPLE_ABOVE:
        some_cost, some_gain = unify_cost[::SAMPLE_STRIDE].contiguous(), gain[::SAMPLE_STRIDE].contiguous()
        some = round(n_pruned / SAMPLE_STRIDE), min(round(total / SAMPLE_STRIDE), len(some_gain))
        bracket = [level.d for level in _bracket(some_cost, some_gain, *some)] if some[1] else [bottom, top]
        noise = math.sqrt(len(some_gain)) / 8  # a finer answer is below the sample's own error
        guess = _bisect(some_cost, some_gain, *some, bracket[0], bracket[1], noise)[0]
        widths = (0.32, 0.08, 0.02)  # around the sample's answer, which has an error
        lows, highs = [guess * (1 - w) for w in widths], [guess * (1 + w) for w in widths if guess * (1 + w) < top]
    while lows:
        low = _level(unify_cost, gain, total, lows.pop())
        if count((low.costs <= low.largest) & (gain < low.d)) <= n_pruned:
            break
    else:
        low = _level(unify_cost, gain, total, bottom)
    while highs:
        high = _level(unify_cost, gain, total, highs.pop())
        if count((high.costs < high.largest) & (gain < high.d)) >= n_pruned:
            break
    else:
        high = _level(unify_cost, gain, total, top)
    return low, high


def _mixed(unify_cost: Tensor, gain: Tensor, n_pruned: int, total: int, low: Tensor, high: Tensor) -> Tensor:
    """Return the blocks taken at ``low``, with as many swapped for those taken at ``high`` as the count needs."""
    _, at_low = _count(unify_cost, gain, total, low)
    _, at_high = _count(unify_cost, gain, total, high)
    cheap = gain < high  # pruning these costs nothing extra at this multiplier
    short = n_pruned - count(at_low & cheap)
    if short <= 0:
        return at_low
    comes, goes = (at_high & ~at_low & cheap).nonzero()[:short], (at_low & ~at_high & ~cheap).nonzero()[:short]
    at_low[comes], at_low[goes] = True, False
    return at_low


def choose_kinds(costs: Tensor, pruned: tuple[int, int], unified: tuple[int, int]) -> Tensor:
    """Return the kinds of blocks whose costs sum to the least, with the numbers of pruned and unified ones in bounds.

    The least sum is a convex function of the two numbers (it is the optimum of an assignment problem in its right-hand
    side). If the free optimum is out of bounds, the best one therefore has one number at the bound it broke.

    Args:
        costs: ``(3, n)`` floating: what each block costs dense, unified and pruned.
        pruned: The least and the largest number of pruned blocks.
        unified: The least and the largest number of unified blocks.

    Returns:
        ``(n,)`` int64, a :class:`Kind` a block.

    Example:
        >>> choose_kinds(torch.tensor([[0.0, 5.0], [1.0, 4.0], [2.0, 2.0]]), (0, 2), (1, 2)).tolist()
        [1, 2]
    """
    n_blocks = costs.shape[1]
    pruned = pruned[0], min(pruned[1], n_blocks - unified[0])
    unified = unified[0], min(unified[1], n_blocks - pruned[0])
    free = _cheaper(costs, Kind.UNIFIED, Kind.DENSE)
    free = torch.where(
        costs[Kind.PRUNED] < torch.minimum(costs[Kind.DENSE], costs[Kind.UNIFIED]), int(Kind.PRUNED), free
    )
    found = []
    for kind, other, bounds, others in (
        (Kind.PRUNED, Kind.UNIFIED, pruned, unified),
        (Kind.UNIFIED, Kind.PRUNED, unified, pruned),
    ):
        n = _clamped(free, kind, bounds)
        if n != int((free == kind).sum()):
            kinds = _fixed(costs, kind, other, n)
            m = _clamped(kinds, other, others)
            if m != int((kinds == other).sum()):
                kinds = _both(costs, *((n, m) if kind == Kind.PRUNED else (m, n)))
            found.append(kinds)
    if not found:
        return free
    return min(found, key=lambda kinds: float(costs.gather(0, kinds[None]).sum(dtype=torch.float64)))


def _cheaper(costs: Tensor, kind: Kind, other: Kind) -> Tensor:
    return torch.where(costs[kind] < costs[other], int(kind), int(other))


def _clamped(kinds: Tensor, kind: Kind, bounds: tuple[int, int]) -> int:
    """Return the number of blocks of a kind, or the bound that it breaks."""
    return min(max(int((kinds == kind).sum()), bounds[0]), bounds[1])


def _fixed(costs: Tensor, kind: Kind, other: Kind, n: int) -> Tensor:
    """Return the cheapest kinds with exactly ``n`` blocks of one kind."""
    rest = _cheaper(costs, other, Kind.DENSE)
    return rest.masked_fill(smallest(costs[kind] - torch.minimum(costs[other], costs[Kind.DENSE]), n), int(kind))


def _both(costs: Tensor, n_pruned: int, n_unified: int) -> Tensor:
    """Return the cheapest kinds with exactly so many pruned and unified blocks."""
    gain = costs[Kind.PRUNED] - costs[Kind.UNIFIED]
    gain = gain - gain.min().clamp_max(0)  # the same for each pruned block, so that no choice changes
    pruned, unified = cheapest(costs[Kind.UNIFIED] - costs[Kind.DENSE], gain, n_pruned, n_unified)
    return unified.to(torch.int64) + int(Kind.PRUNED) * pruned.to(torch.int64)
