"""Cost: the bits that choices take in a file, estimated before it is written, and the search for a size."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_muws.errors import SettingError

FINEST = 1 << 15  # a stored value has a sign and a whole number of steps below this
MAX_TURNS = 60  # of a search
SAMPLED = 1 << 14  # values of a tensor that its entropies are estimated from
SEARCH = (1e-20, 1e4)  # multipliers; distances are shares of a tensor's energy, so that no network needs others
SLACK = 0.002  # a search ends when the size is this close, as a share of it
ROUGH = 0.05  # the same for a search on samples
NEAR = 1.2  # the first factor by which a search leaves a guess
LANE_BITS = 32 / 2048  # a range coder's states, spread over the symbols
FILE_BYTES = 900.0  # header, streams' places, and what the manifest has besides its tensors
TENSOR_BYTES = 35.0  # a tensor's line in the compressed manifest


def check_compression(compression: object) -> None:
    """Check a requested compression.

    Raises:
        SettingError: It is not a finite number above 1.
    """
    _check_factor("compression", compression, 20)


def check_speedup(speedup: object) -> None:
    """Check a requested speedup.

    Raises:
        SettingError: It is not a finite number above 1.
    """
    _check_factor("speedup", speedup, 2)


def _check_factor(name: str, value: object, example: int) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 1 < value < math.inf:  # type: ignore[operator]
        raise SettingError(f"{name}={value!r} is not allowed: give a finite number above 1, such as {example}")


def unreachable(compression: float, reachable: tuple[float, float]) -> SettingError:
    """Return the error for a compression that no budget reaches."""
    return SettingError(
        f"compression={compression:g} cannot be reached: signs, kinds of blocks, headers and what is not covered take "
        f"too much; this model allows {reachable[0]:.3g} to {reachable[1]:.3g}, so ask for less or cover more weights"
    )


def file_bytes(tensor_bytes: Iterable[float]) -> float:
    """Return about how many bytes a file has whose tensors take these bytes."""
    return FILE_BYTES + sum(tensor_bytes)


def search(
    size: Callable[[float], float],
    target: float,
    low: float = SEARCH[0],
    high: float = SEARCH[1],
    guess: float = 0.0,
    slack: float = SLACK,
) -> float:
    """Return a multiplier whose size is at most ``target``, and within ``slack`` of it if the size is that fine.

    Args:
        size: Of a multiplier; falls as the multiplier grows.
        target: The largest size allowed.
        low: A multiplier, returned if its size is small enough.
        high: A multiplier, returned if no smaller one has a small enough size.
        guess: A multiplier that may be near the result, which saves time; 0 for none.
        slack: As a share of the target.
    """
    size = functools.cache(size)
    if guess:
        low, high = _around(size, target, low, high, min(max(guess, low), high))
    large, small = size(low), size(high)
    if large <= target:
        return low
    if small > target:
        return high
    for turn in range(MAX_TURNS):
        share = 0.5
        if high / low < 100 and turn % 3:  # near by, the logarithm of the size is almost linear in the multiplier's
            share = min(max(math.log(large / (target * (1 - slack / 2))) / math.log(large / small), 0.05), 0.95)
        middle = low * (high / low) ** share
        found = size(middle)
        if found > target:
            low, large = middle, found
        else:
            high, small = middle, found
        if target * (1 - slack) <= small or high / low < 1 + 1e-9:
            break
    return high


def _around(
    size: Callable[[float], float], target: float, low: float, high: float, guess: float
) -> tuple[float, float]:
    """Return two multipliers near a guess, one with too large a size and one without, or the end that was met."""
    last, factor, is_large = guess, NEAR, size(guess) > target
    while low < last < high or (last == low and is_large) or (last == high and not is_large):
        found = min(last * factor, high) if is_large else max(last / factor, low)
        if (size(found) > target) != is_large:
            return (last, found) if is_large else (found, last)
        last, factor = found, factor**2
    return (last, high) if is_large else (low, last)


def root(function: Callable[[float], float], low: float, high: float, tolerance: float) -> float:
    """Return where an increasing function is 0, to the tolerance in place or in value; an end if it is 0 nowhere.

    This is the Illinois method (Dowell and Jarratt 1971): regula falsi that halves the value of an end that stays.

    Example:
        >>> round(root(lambda x: x**3 - 8, 0.0, 5.0, 1e-6), 5)
        2.0
    """
    below = function(low)
    if below >= -tolerance or (above := function(high)) <= 0:
        return low if below >= -tolerance else high
    last = 0
    for _ in range(MAX_TURNS):
        middle = (low * above - high * below) / (above - below)
        found = function(middle)
        if abs(found) <= tolerance or high - low <= tolerance:
            return middle
        side = 1 if found > 0 else -1
        if side > 0:
            high, above, below = middle, found, below / (2 if last == side else 1)
        else:
            low, below, above = middle, found, above / (2 if last == side else 1)
        last = side
    return middle


def best_step(multiplier: float, importance: float, n_values: int, n_weights: int) -> float:
    """Return the step at which a finer one costs as much in bits as it saves in distance.

    ``n_values`` stored values stand for ``n_weights`` weights, each with an error of ``step^2 / 12``, and half the step
    costs a bit more a value: ``step^2 = 6 * multiplier * n_values / (ln 2 * importance * n_weights)``. This holds for
    small steps (Gish and Pierce 1968); for normal and Laplacian values of deviation s it is within 15 % up to 2 s.

    Example:
        >>> best_step(math.log(2) / 6, importance=1.0, n_values=16, n_weights=16)
        1.0
    """
    return math.sqrt(6 * multiplier * n_values / (math.log(2) * importance * n_weights))


def sample(x: Tensor, n: int = SAMPLED) -> Tensor:
    """Return ``n`` entries of ``(len,)``, spread evenly but in step with nothing; all of them if there are no more.

    Example:
        >>> sample(torch.arange(100), 3)
        tensor([ 0, 23, 61])
    """
    if len(x) <= n:
        return x
    # multiples of the golden ratio never fall in step with rows or blocks, as a stride would
    at = (torch.arange(n, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2) % 1 * len(x)).to(torch.int64)
    return x[at.sort().values.to(x.device)]


def coarsest_step(top: float, n_magnitudes: int) -> float:
    """Return the largest step that leaves the largest value ``top`` at least one step, and no magnitude above ``top``.

    Example:
        >>> coarsest_step(1.0, n_magnitudes=0), coarsest_step(1.0, n_magnitudes=9)
        (1.98, 1.0)
    """
    return top if n_magnitudes else 1.98 * top


class Cost(NamedTuple):
    """What one stored value costs: bits of the file, and the squared error."""

    bits: float
    error: float


def value_cost(values: Tensor, step: float, least: int = 0) -> Cost:
    """Return the mean cost of values that are rounded to whole multiples of a step.

    A file has a value as two bytes, sign last; each byte is coded with the order-0 entropy of its stream.

    Args:
        values: ``(n,)`` floating; none cost nothing.
        step: Above ``max |value| / 2**15``.
        least: The fewest steps of a value: 1 for magnitudes of unified blocks, which do not become zero.

    Example:
        >>> value_cost(torch.tensor([-1.0, 1.0]), step=1.0).error
        0.0
    """
    if not len(values):
        return Cost(0.0, 0.0)
    steps = (values.abs() / step).round_().clamp_(least, FINEST - 1)
    error = float((values.abs() - steps * step).square().mean(dtype=torch.float64))
    codes = steps.to(torch.int64) * 2 + ((values < 0) & (steps > 0))
    low, high = codes & 255, codes >> 8
    bits = entropy(low.bincount()) + LANE_BITS
    if high.any():
        bits += entropy(high.bincount()) + LANE_BITS
    return Cost(bits, error)


def table_bits(n_values: int, n_steps: float) -> float:
    """Return about how many bits a tensor's own table of frequencies takes, or what it adds to the neighbours' table.

    A table has about 10 bits for each of the symbols up to the largest one: two a step, for the two signs. A tensor of
    few values shares its neighbours' table, which costs it at most a third more.
    """
    return min(10 * min(256.0, 2 * n_steps), 2.0 * n_values)


def entropy(counts: Tensor) -> float:
    """Return the order-0 entropy in bits a symbol, of symbols that occur so often; 0 if there are none.

    Example:
        >>> entropy(torch.tensor([1, 1, 0, 2]))
        1.5
    """
    p = counts[counts > 0].to(torch.float64)
    p /= p.sum()
    return max(0.0, -float((p * p.log2()).sum()))
