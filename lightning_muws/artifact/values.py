"""Weights <-> patterns: bit for bit, as whole multiples of a step, or rounded to 16 bits; and which for a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_muws.artifact.entropy import count, entropy_bytes
from lightning_muws.artifact.streams import Patterns, block_bits, is_unified, kinds_of, planes, sign_bit, slabs, split
from lightning_muws.errors import FormatError, SettingError
from lightning_muws.structure.grid import BlockGrid

FLOATS = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32, "float64": np.uint64}
# of one byte: exact, and in blocks where that makes the file smaller
BYTES = ("int8", "uint8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
ZEROS = {"int8": 0, "uint8": 128}  # what counts as zero: quantised weights lie on both sides of it
STEPS = "grid"  # whole multiples of a step, 16 bits each. Format 1.0 writes this word; everywhere else they are "steps"
PALETTE = "palette"  # indices into a list of magnitudes, 16 bits each
MAX_STEPS = (1 << 15) - 1
MAX_PALETTE = 4096  # magnitudes in a list
WIDTHS = {**{name: np.dtype(kind) for name, kind in FLOATS.items()}, **dict.fromkeys((STEPS, PALETTE), np.dtype("u2"))}
WIDTHS |= dict.fromkeys(BYTES, np.dtype("u1"))
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
LEAST_SAVED = 512  # bytes that a palette saves: only readers of format 1.1 know it
SAMPLED = 4096  # values from which to guess a step
# Where they lie in a tensor. A stride would fall in step with rows and blocks; multiples of the golden ratio never do.
SCATTERED = np.arange(SAMPLED) * ((np.sqrt(5) - 1) / 2) % 1


@dataclass(frozen=True)
class Loss:
    """How far values may move, and which tensors may lose precision.

    Args:
        max_error: The largest ``|w - w'|``, in units that ``relative_to`` names; 0 for none.
        relative_to: ``tensor_max`` or ``model_max``, the largest ``|w|``; or ``absolute``.
        value_dtype: Round to this dtype instead.
        lossy: ``weights``, the parameters of two or more axes; or ``all`` floating tensors.

    Raises:
        SettingError: A value is not allowed.
    """

    max_error: float = 0.0
    relative_to: Literal["tensor_max", "model_max", "absolute"] = "tensor_max"
    value_dtype: Literal["float16", "bfloat16"] | None = None
    lossy: Literal["weights", "all"] = "weights"

    def __post_init__(self) -> None:
        if isinstance(self.max_error, bool) or not isinstance(self.max_error, (int, float)):
            raise SettingError(f"max_error={self.max_error!r} is not allowed: give a number >= 0")
        if not 0 <= self.max_error < float("inf"):
            raise SettingError(f"max_error={self.max_error!r} is not allowed: give a finite number >= 0")
        allowed = {
            "relative_to": ("tensor_max", "model_max", "absolute"),
            "value_dtype": (None, "float16", "bfloat16"),
            "lossy": ("weights", "all"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise SettingError(
                    f"{name}={getattr(self, name)!r} is not allowed: give {' or '.join(map(repr, values))}"
                )
        if self.max_error and self.value_dtype:
            raise SettingError(
                f"max_error={self.max_error} and value_dtype={self.value_dtype!r} are two ways to lose precision: "
                "give one of them"
            )

    def __bool__(self) -> bool:
        return bool(self.max_error or self.value_dtype)


@dataclass(frozen=True)
class Form:
    """How the values of a tensor are written.

    Args:
        stored: A floating dtype; or ``STEPS``: whole multiples of ``step``; or ``PALETTE``.
        step: In units of the weights; exact in float32 (in float64 for a float64 tensor). 0 for a dtype.
        is_lossy: Values need not be multiples of the step: they are rounded, and zeros lose their sign. Readers need
            not know.
        palette: The patterns of the magnitudes that occur but 0, in rising order, if they are stored as indices.
    """

    stored: str
    step: float = 0.0
    is_lossy: bool = False
    palette: tuple[int, ...] = ()

    def patterns(self, x: Tensor, block_shape: tuple[int, int] | None = None) -> Patterns:
        """Return the patterns of values, of the same shape.

        Args:
            x: Contiguous, on the CPU.
            block_shape: Of a matrix of whole blocks whose unified blocks must not become zero; None where all is flat.
        """
        if self.stored == PALETTE:
            return self._indices(bits(x))
        if self.stored in ZEROS:
            return _sign_and_magnitude(bits(x) ^ np.uint8(ZEROS[self.stored]))
        if self.stored != STEPS:
            return bits(x.to(getattr(torch, self.stored)))
        values = _numpy(x)
        steps = np.rint(np.abs(values) / values.dtype.type(self.step)).astype(np.uint16)
        negative = np.signbit(values)
        if self.is_lossy:
            if block_shape is not None:
                steps[_in_unified_blocks(bits(x), block_shape) & (values != 0) & (steps == 0)] = 1
            negative &= steps > 0
        signed: Patterns = steps | (negative.astype(np.uint16) << np.uint16(15))
        return signed

    def is_plain(self, dtype: torch.dtype) -> bool:
        """Return whether the patterns are the bits of the values in this dtype."""
        return self.stored not in ZEROS and self.stored == str(dtype).removeprefix("torch.")

    def _indices(self, u: Patterns) -> Patterns:
        """Return the index of each magnitude, 0 for 0, with its sign in the highest bit."""
        sign = sign_bit(u.dtype)
        found = np.searchsorted(np.array((0, *self.palette), u.dtype), u & ~sign).astype(np.uint16)
        signed: Patterns = found | (((u & sign) != 0).astype(np.uint16) << np.uint16(15))
        return signed

    def values(self, u: Patterns, dtype: torch.dtype) -> Tensor:
        """Return the values of patterns, of the same shape, in this dtype.

        Raises:
            FormatError: A pattern is an index beyond the palette.
        """
        if self.stored == PALETTE:
            magnitudes = np.array((0, *self.palette), f"u{dtype.itemsize}")
            at = u & np.uint16(MAX_STEPS)
            if at.size and at.max() >= len(magnitudes):
                raise FormatError(f"a value has index {at.max()} of a palette of {len(self.palette)} magnitudes")
            sign = np.where(u >> np.uint16(15), sign_bit(magnitudes.dtype), magnitudes.dtype.type(0))
            return from_bits(magnitudes[at] | sign, dtype)
        if self.stored in ZEROS:
            return from_bits(_sign_and_magnitude(u) ^ np.uint8(ZEROS[self.stored]), dtype)
        if self.stored != STEPS:
            return from_bits(u, getattr(torch, self.stored)).to(dtype)
        wide = _wide(dtype)
        magnitudes = (u & np.uint16(MAX_STEPS)).astype(wide) * wide(self.step)
        return torch.from_numpy(np.where(u >> np.uint16(15), -magnitudes, magnitudes)).to(dtype)


def _sign_and_magnitude(u: Patterns) -> Patterns:
    """Return int8 as its sign and magnitude, so that -3 and 3 have one magnitude; -128 becomes -0. Undoes itself."""
    negative = np.where(u & np.uint8(127), -u & np.uint8(127) | np.uint8(128), np.uint8(128))
    return np.where(u >> np.uint8(7), negative, u).astype(np.uint8)


def displayed(name: str) -> str:
    """Return how reports display the name of a form, or of a stream of values in that form.

    Example:
        >>> displayed("free.grid.0")
        'free.steps.0'
    """
    return ".".join("steps" if part == STEPS else part for part in name.split("."))


def bits(x: Tensor) -> Patterns:
    """Return the bits of a contiguous floating tensor on the CPU, in the same memory."""
    signed: NDArray[Any] = x.view(SIGNED[x.element_size()]).numpy()
    unsigned: Patterns = signed.view(f"u{x.element_size()}")
    return unsigned


def from_bits(u: Patterns, dtype: torch.dtype) -> Tensor:
    """Undo :func:`bits`."""
    return torch.from_numpy(u.view(f"i{u.itemsize}")).view(dtype)


def choose(x: Tensor, grid: BlockGrid | None, loss: Loss, largest: float) -> Form:
    """Return the form that makes a floating tensor small: exact wherever no loss is allowed, or none fits the bound.

    Args:
        x: Contiguous, on the CPU.
        grid: How it is cut; None where it is flat.
        loss: What may be lost.
        largest: What ``loss.max_error`` is relative to.
    """
    exact = Form(str(x.dtype).removeprefix("torch."))
    if not x.numel():
        return exact
    low, high = (float(value) for value in torch.aminmax(x.view(-1)))
    top = max(-low, high)
    if not np.isfinite(top):
        return _with_palette(x, grid, exact)
    if loss.value_dtype:
        rounded = Form(loss.value_dtype)
        return rounded if keeps_blocks(x, grid, rounded) else exact
    step = _exact_step(x.view(-1), top) if top else 0.0
    if loss.max_error:
        # Half a step, and what the step, the product and the tensor's own dtype round off.
        bound = loss.max_error * largest
        room = bound - (top + 2 * bound) * torch.finfo(x.dtype).eps
        if room > 0:
            # a unified block below half a step becomes one step, so that has to be within reach of the smallest one
            coarse = _wide(x.dtype)(min(2 * room, room + _smallest_magnitude(x, grid), 4 * top))
            if coarse > step and top / coarse < MAX_STEPS - 1:
                return Form(STEPS, float(coarse), is_lossy=True)
    return _with_palette(x, grid, Form(STEPS, step) if step else exact)


def repeats(u: Patterns) -> bool:
    """Return whether at most a quarter of a sample of a list are different values; most lists take little time."""
    few, more = (u[:: max(1, len(u) // n)] for n in (SAMPLED // 4, SAMPLED))
    return len(u) >= SAMPLED // 4 and 5 * len(np.unique(few)) < 4 * len(few) and 4 * len(np.unique(more)) <= len(more)


def _with_palette(x: Tensor, grid: BlockGrid | None, other: Form) -> Form:
    """Return the form of indices into the magnitudes that occur, if they are few and it is smaller than the other."""
    flat = x.view(-1)
    if len(flat) < SAMPLED:
        return other
    sample = flat if len(flat) == SAMPLED else flat[torch.from_numpy(_scattered(len(flat)))]
    few = bits(sample)
    sign = sign_bit(few.dtype)
    if not repeats(few & ~sign):
        return other
    found: NDArray[Any] = np.zeros(1, few.dtype)
    for part in slabs(len(flat), 1):
        found = np.union1d(found, bits(flat[part]) & ~sign)
        if len(found) > MAX_PALETTE:
            return other
    form = Form(PALETTE, palette=tuple(found[1:].tolist()))
    own, indices = (_value_bytes(x, grid, few, one) for one in (other, form))
    saved = 0.95 * own - indices - few.itemsize * len(form.palette)  # hexadecimal digits, which zlib halves
    return form if saved > LEAST_SAVED else other


def _value_bytes(x: Tensor, grid: BlockGrid | None, sample: Patterns, form: Form) -> float:
    """Return about how many bytes the values of a tensor take in a form, of a flat one from a sample of its values.

    In blocks most values that repeat are in no stream: pruned ones, and all but one of a unified block.
    """
    counts: dict[str, NDArray[np.int64]] = {}
    for stream, u in _held(x, grid) if grid else [("free", sample)]:
        if len(u):
            found = np.array([count(one) for one in planes(form.patterns(from_bits(u, x.dtype)))])
            counts[stream] = counts[stream] + found if stream in counts else found
    n_bytes = math.fsum(entropy_bytes(plane) for found in counts.values() for plane in found)
    return n_bytes * (1.0 if grid else x.numel() / len(sample))


def _held(x: Tensor, grid: BlockGrid) -> Iterator[tuple[str, Patterns]]:
    """Yield the patterns of a tensor in blocks that its streams hold, with the name of the stream."""
    for slab in _slabs(x, grid):
        parts = split(bits(slab), grid.block_shape)
        yield "magnitudes", parts.magnitudes
        yield "free", parts.free.reshape(-1)
    for edge in grid.edges(grid.matrix(x)):
        yield "free", bits(edge.reshape(-1).contiguous())


def _scattered(n: int) -> NDArray[np.int64]:
    return np.unique((SCATTERED * n).astype(np.int64))


def _numpy(x: Tensor) -> NDArray[Any]:
    """Return the values as float64 for float64, else as float32, which holds them exactly."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).numpy()


def _wide(dtype: torch.dtype) -> Any:
    return np.float64 if dtype == torch.float64 else np.float32


def _exact_step(flat: Tensor, top: float) -> float:
    """Return a step of which all values are whole multiples, bit for bit; 0 if there is none, as is usual."""
    sample = flat if len(flat) <= SAMPLED else flat[torch.from_numpy(_scattered(len(flat)))]
    found = np.unique(np.abs(_numpy(sample)).astype(np.float64))
    seen = np.concatenate((found[(found > 0) & (found < top)], [top]))
    gap, wide = float(np.diff(seen, prepend=0.0).min()), _wide(flat.dtype)
    for divisor in range(1, 9):  # the smallest gap that was seen need not be one step
        if top > MAX_STEPS * (gap / divisor):
            return 0.0
        guess = wide(_refined(gap / divisor, seen.tolist(), flat.dtype))
        for near in (guess, np.nextafter(guess, wide(0)), np.nextafter(guess, wide(np.inf))) if guess else ():
            form = Form(STEPS, float(near))
            if near and _is_exact(sample, form) and are_multiples(flat, float(near)):
                return float(near)
    return 0.0


def are_multiples(flat: Tensor, step: float) -> bool:
    """Return whether all values ``(n,)`` are what a file with this step holds, bit for bit."""
    form = Form(STEPS, step)
    return bool((flat.abs() < step * MAX_STEPS).all()) and all(_is_exact(flat[s], form) for s in slabs(len(flat), 1))


def _refined(step: float, seen: list[float], dtype: torch.dtype) -> float:
    """Return the step that values, smallest first, are whole multiples of, near a first guess; 0 if one is none.

    Each value is larger than the one before and makes the step more precise. A multiple is off by what the step, the
    product and the dtype round off, or by the distance of subnormals.
    """
    about = torch.finfo(dtype)
    for i, value in enumerate(seen):
        ratio = value / step
        n = max(1, round(ratio))
        if i and abs(ratio - n) > 4 * about.eps * n + 2 * about.tiny * about.eps / step:
            return 0.0
        step = value / n
    return step


def _is_exact(flat: Tensor, form: Form) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.array_equal(bits(form.values(form.patterns(flat), flat.dtype)), bits(flat))


def _in_unified_blocks(u: Patterns, block_shape: tuple[int, int]) -> NDArray[np.bool_]:
    unified = is_unified(kinds_of(*block_bits(u, block_shape)))
    return unified.repeat(block_shape[0], 0).repeat(block_shape[1], 1)


def _slabs(x: Tensor, grid: BlockGrid) -> Any:
    """Yield slabs of whole blocks of a tensor, contiguous."""
    covered = grid.covered(grid.matrix(x))
    for rows in slabs(len(covered), covered.shape[1], grid.block_shape[0]):
        yield covered[rows].contiguous()


def _smallest_magnitude(x: Tensor, grid: BlockGrid | None) -> float:
    """Return the smallest magnitude of a unified block that is not zero; infinity if there is none."""
    smallest = np.inf
    for slab in _slabs(x, grid) if grid else ():
        ors, ands = block_bits(bits(slab), grid.block_shape)  # type: ignore[union-attr]
        found = (ands & ~sign_bit(ands.dtype))[is_unified(kinds_of(ors, ands))]
        found = found[found > 0]
        if len(found):  # patterns are ordered as their values
            smallest = min(smallest, float(from_bits(found.min(keepdims=True), x.dtype)))
    return smallest


def keeps_blocks(x: Tensor, grid: BlockGrid | None, form: Form) -> bool:
    """Return whether in this form no finite value overflows, and no unified block becomes zero."""
    flat = x.view(-1)
    if not all(torch.isfinite(form.values(form.patterns(flat[s]), x.dtype)).all() for s in slabs(len(flat), 1)):
        return False
    for slab in _slabs(x, grid) if grid else ():
        lost = (slab != 0).numpy() & (form.values(form.patterns(slab), x.dtype) == 0).numpy()
        if (lost & _in_unified_blocks(bits(slab), grid.block_shape)).any():  # type: ignore[union-attr]
            return False
    return True
