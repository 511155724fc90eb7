"""Precision: the step of each tensor for one file size; measured on estimates, and settled by files really coded."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lightning_muws.artifact.entropy import Ints, count, entropy_bytes
from lightning_muws.artifact.source import State
from lightning_muws.artifact.streams import N_KINDS, Patterns, plane, rotate, slabs, split
from lightning_muws.artifact.values import (
    MAX_STEPS,
    PALETTE,
    STEPS,
    Form,
    Loss,
    are_multiples,
    bits,
    choose,
    from_bits,
    keeps_blocks,
)
from lightning_muws.structure.cost import (
    SAMPLED,
    SEARCH,
    best_step,
    coarsest_step,
    file_bytes,
    sample,
    search,
    unreachable,
    value_cost,
)
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.micro import MicroStructure
from lightning_muws.structure.plan import clean_name

ROOM = 1.05  # a file may be this much smaller than what was requested
AIM = 1.012  # what is tried, so that most first tries are within
TRIALS = 12  # files that are coded at the most
OVERSAMPLED = 16  # a pass collects this many times the sample, as it does not know how many values of a role will come
HALF_BITS = 14  # that a value takes in float16
Coded = TypeVar("Coded")


class Offer(NamedTuple):
    """What a tensor takes at some price of a bit.

    Args:
        cost: Its bits, and its squared distance in bits.
        n_bits: About how many bits it takes in the file.
        form: How its values are written.
        structure: What its blocks become before; None if they stay as they are.
    """

    cost: float
    n_bits: float
    form: Form
    structure: MicroStructure | None = None


class Offering(Protocol):
    """What a budget needs of a tensor."""

    def offer(self, multiplier: float) -> Offer:
        """Return the cheapest that the tensor can be if a bit costs ``multiplier``."""
        ...


@dataclass(frozen=True)
class Candidate:
    """What a budget knows of a floating tensor whose kinds of blocks are settled; lengths are in units of ``unit``.

    Args:
        exact: The form that loses nothing, or the only one that is allowed.
        exact_bits: About what it takes in that form.
        fixed_bits: About what its kinds of blocks and signs take in any form.
        half: The error of float16, if the tensor may be stored so; infinity if not.
        unit: A power of two near the largest ``|w|``; 0 if the tensor may not be stored in steps.
        top: The largest ``|w|``.
        finest: The smallest step.
        importance: What a squared distance of 1 costs.
        free: ``(n,)`` float32, a sample of the values in no unified block.
        magnitudes: ``(n,)`` float32, a sample of the magnitudes of unified blocks.
        n_free: How many values are in no unified block.
        n_magnitudes: How many magnitudes there are.
        block_numel: Weights of a unified block.
    """

    exact: Form
    exact_bits: float
    fixed_bits: float = 0.0
    half: float = math.inf
    unit: float = 0.0
    top: float = 0.0
    finest: float = 0.0
    importance: float = 0.0
    free: Tensor = field(default_factory=lambda: torch.empty(0))
    magnitudes: Tensor = field(default_factory=lambda: torch.empty(0))
    n_free: int = 0
    n_magnitudes: int = 0
    block_numel: int = 1

    def offer(self, multiplier: float) -> Offer:
        """Return the cheapest form if a bit costs ``multiplier``."""
        found = [Offer(self.exact_bits, self.exact_bits, self.exact)]
        if self.half < math.inf:
            n_bits = HALF_BITS * (self.n_free + self.n_magnitudes) + self.fixed_bits
            found.append(Offer(n_bits + self.importance * self.half / multiplier, n_bits, Form("float16")))
        if self.unit:
            n_weights = self.n_free + self.n_magnitudes * self.block_numel
            step = best_step(multiplier, self.importance, self.n_free + self.n_magnitudes, n_weights)
            step = min(max(step, self.finest), coarsest_step(self.top, self.n_magnitudes))
            free, one = value_cost(self.free, step), value_cost(self.magnitudes, step, least=1)
            n_bits = self.n_free * free.bits + self.n_magnitudes * one.bits + self.fixed_bits
            error = self.n_free * free.error + self.n_magnitudes * self.block_numel * one.error
            form = Form(STEPS, float(np.float32(step * self.unit)), is_lossy=True)
            found.append(Offer(n_bits + self.importance * error / multiplier, n_bits, form))
        return min(found, key=lambda offer: offer.cost)


def allowed_forms(
    model: object, state: State, lossy: str, parameters: Collection[str] | None = None
) -> dict[str, tuple[str, ...]]:
    """Return what each tensor may be stored in besides its exact form, by name.

    ``parameters`` are the names of the model's parameters; by default those that a module has. Other tensors keep their
    relative precision: a running variance that becomes zero is far worse than its distance says.
    """
    allowed: dict[str, tuple[str, ...]] = dict.fromkeys(state.weights, ("steps",))
    if lossy == "weights":
        return allowed
    if parameters is None:
        named = model.named_parameters() if isinstance(model, nn.Module) else ()
        parameters = {clean_name(name) for name, _ in named}
    allowed |= dict.fromkeys(state.tensors.keys() & set(parameters), ("steps",))
    return dict.fromkeys(state.tensors, ("float16",)) | allowed


def candidate(
    x: Tensor, grid: BlockGrid | None, allowed: Collection[str], importance: float | None = None, step: float = 0.0
) -> Candidate:
    """Return what a budget needs to know of a floating tensor.

    Args:
        x: Contiguous, on the CPU.
        grid: How it is cut; None if it is flat.
        allowed: What the tensor may be stored in besides its exact form: ``float16``, ``steps``.
        importance: What a squared distance of 1 costs; by default ``1 / |x|^2``.
        step: Of which it may be whole multiples; 0 if none is known.
    """
    exact = Form(STEPS, step) if step and are_multiples(x.view(-1), step) else choose(x, grid, Loss(), 1.0)
    values = _values(x, grid)
    fixed_bits = values.fixed_bits
    exact_bits = values.bits_in(exact, x.dtype) + fixed_bits
    low, high = (float(value) for value in torch.aminmax(x.view(-1))) if x.numel() else (0.0, 0.0)
    top = max(-low, high)
    if not math.isfinite(top) or top == 0 or not allowed:
        return Candidate(exact, exact_bits, fixed_bits)
    unit = 2.0 ** math.frexp(top)[1]  # dividing by a power of two is exact, and no square overflows
    flat, energy, half = x.view(-1), 0.0, 0.0
    for part in (flat[rows] for rows in slabs(len(flat), 1)):
        energy += float((part.to(torch.float64) / unit).square().sum())
        half += float(((part.to(torch.float16).to(torch.float64) - part.to(torch.float64)) / unit).square().sum())
    # a step is a float32, and neither one step nor the largest value may get lost in the tensor's own dtype
    infos = torch.finfo(x.dtype), torch.finfo(torch.float32)
    finest = max(top / (MAX_STEPS - 1), *(info.tiny for info in infos))
    fits = 4 * finest < top < min(info.max for info in infos) / 4
    kept = "float16" in allowed and x.element_size() > 2 and keeps_blocks(x, grid, Form("float16"))
    return Candidate(
        exact,
        exact_bits,
        fixed_bits,
        half if kept else math.inf,
        unit if "steps" in allowed and fits else 0.0,
        top / unit,
        finest / unit,
        1 / energy if importance is None else importance * unit**2,
        (values.free.sample(x.dtype).to(torch.float64) / unit).to(torch.float32),
        (values.magnitudes.sample(x.dtype).to(torch.float64) / unit).to(torch.float32),
        values.free.n,
        values.magnitudes.n,
        grid.block_numel if grid else 1,
    )


def estimated_bytes(candidates: Mapping[str, Offering], other_bytes: float, multiplier: float) -> float:
    """Return about how many bytes the file has if a bit costs ``multiplier``."""
    n_bits = math.fsum(one.offer(multiplier).n_bits for one in candidates.values())
    return file_bytes([other_bytes, n_bits / 8])


def fit(
    candidates: Mapping[str, Offering],
    other_bytes: float,
    dense_bytes: int,
    compression: float,
    encode: Callable[[Mapping[str, Offer]], tuple[int, Coded]],
) -> Coded:
    """Return the largest file coded whose size is at most ``dense_bytes / compression``.

    The estimate of the entropies gives a multiplier, the file really coded with it a correction of the estimate, until
    a file is within ``ROOM`` of the limit. If none can be, as where no form lies between two sizes, the best one is
    returned.

    Args:
        candidates: Each floating tensor, by name.
        other_bytes: About what the file takes for all else.
        dense_bytes: Bytes of all tensors in memory.
        compression: The least ``dense_bytes`` over the bytes of the file.
        encode: Codes a file of these offers; returns its bytes, and itself.

    Raises:
        SettingError: No file is as small as that.
    """
    limit = dense_bytes / compression

    def size(multiplier: float) -> float:
        return estimated_bytes(candidates, other_bytes, multiplier)

    def trial(multiplier: float) -> tuple[int, Coded]:
        return encode({name: one.offer(multiplier) for name, one in candidates.items()})

    found = largest(trial, size, limit)
    if found is None:
        (exact, _), (smallest, found) = trial(SEARCH[0]), trial(SEARCH[1])
        if smallest > limit:
            raise unreachable(compression, (dense_bytes / exact, dense_bytes / smallest))
    return found


def largest(
    trial: Callable[[float], tuple[int, Coded]],
    size: Callable[[float], float],
    limit: float,
    aim: float = AIM,
    n_trials: int = TRIALS,
) -> Coded | None:
    """Return the largest file of at most ``limit`` bytes that was found; None if there was none.

    Args:
        trial: Codes a file in which a bit costs the multiplier that is given; returns its bytes, and itself.
        size: About how many bytes that file has.
        limit: In bytes; the search ends with a file within ``ROOM`` of it.
        aim: ``limit`` over the bytes that are aimed at.
        n_trials: Files that are coded at the most.
    """
    low, high = SEARCH[0], SEARCH[1]
    tried: set[float] = set()
    best: tuple[float, Coded | None] = (0.0, None)
    # where perhaps nothing need be lost, that is tried first
    multiplier = low if size(low) <= limit * ROOM else search(size, limit / aim)
    while multiplier not in tried and len(tried) < n_trials:
        tried.add(multiplier)
        n_bytes, coded = trial(multiplier)
        if n_bytes <= limit:
            high, best = multiplier, max(best, (n_bytes, coded), key=lambda found: found[0])
            if n_bytes >= limit / ROOM:
                break
        else:
            low = multiplier
        multiplier = search(size, limit / aim * size(multiplier) / n_bytes, low, high)
        if multiplier in tried and SEARCH[0] < low and high < SEARCH[1]:  # the estimate's slope is wrong here
            multiplier = math.sqrt(low * high)
    return best[1]


@dataclass
class _Values:
    """The values of one role that a pass over a tensor meets: how many, a sample of them, how often bytes occur."""

    rate: float  # at which they are sampled
    n: int = 0
    samples: list[Patterns] = field(default_factory=list)
    counts: dict[int, Ints] = field(default_factory=dict)

    def add(self, values: Patterns) -> None:
        """Add patterns."""
        if not len(values):
            return
        self.n += len(values)
        at = sample(torch.arange(len(values)), math.ceil(self.rate * len(values)))
        self.samples.append(values[at.numpy()])
        turned = rotate(values)
        for i in range(values.itemsize):
            self.counts[i] = self.counts.get(i, np.zeros(256, np.int64)) + count(plane(turned, i))

    def sample(self, dtype: torch.dtype) -> Tensor:
        """Return a sample of the values."""
        return sample(from_bits(np.concatenate(self.samples), dtype)) if self.samples else torch.empty(0, dtype=dtype)


class _Measured(NamedTuple):
    free: _Values
    magnitudes: _Values
    fixed_bits: float  # of kinds and signs

    def bits_in(self, exact: Form, dtype: torch.dtype) -> float:
        """Return about how many bits all values take in a form that loses nothing."""
        if exact.stored == STEPS:
            costs = ((v.n, value_cost(v.sample(dtype), exact.step)) for v in (self.free, self.magnitudes))
            return sum(n * cost.bits for n, cost in costs)
        counted = (counts for values in (self.free, self.magnitudes) for counts in values.counts.values())
        own = sum(8 * entropy_bytes(counts) for counts in counted)
        return own * (0.5 if exact.stored == PALETTE else 1.0)


def _values(x: Tensor, grid: BlockGrid | None) -> _Measured:
    """Return what a tensor is made of; its values are read a slab at a time."""
    rate = min(1.0, OVERSAMPLED * SAMPLED / max(1, x.numel()))
    free, magnitudes = _Values(rate), _Values(rate)
    if grid is None:
        flat = x.view(-1)
        for rows in slabs(len(flat), 1):
            free.add(bits(flat[rows]))
        return _Measured(free, magnitudes, 0.0)
    matrix = grid.matrix(x)
    covered = grid.covered(matrix)
    for edge in grid.edges(matrix):
        free.add(bits(edge.reshape(-1).contiguous()))
    n_signs, counts = 0, np.zeros(N_KINDS, np.int64)
    for rows in slabs(len(covered), covered.shape[1], grid.block_shape[0]):
        parts = split(bits(covered[rows].contiguous()), grid.block_shape)
        free.add(parts.free.reshape(-1))
        magnitudes.add(parts.magnitudes)
        n_signs += parts.signs.size
        counts += np.bincount(parts.kinds, minlength=N_KINDS)
    return _Measured(free, magnitudes, n_signs + 8 * entropy_bytes(counts))
