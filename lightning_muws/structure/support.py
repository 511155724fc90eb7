"""A structure with its choices made: the linear subspace that a weight may move in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_muws.structure.grid import BlockGrid, fold
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.pieces import Pieces, bits, corners, pack, unit_bytes, unpack

MEMORY_RATIO = 0.35  # of the weight: the most memory of a support with all that it keeps


@dataclass
class _Kept:
    """What a support keeps of its own choices.

    Args:
        n_unified: How many blocks are unified; None before it is computed.
        prunes: Whether a block is pruned; None before it is computed.
        corners: Where unified blocks start, by the units of a row and the bytes of a unit.
        masks: All ones where a weight is not pruned, ``(down, 1, across * cols)``, by dtype. Making it is half the work
            of pruning.
    """

    n_unified: int | None = None
    prunes: bool | None = None
    corners: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    masks: dict[torch.dtype, Tensor] = field(default_factory=dict)


class Support:
    """A structure with its choices made: what is left is a linear subspace, for weights, gradients and moments alike.

    Pruned blocks cost one pass over the weight, unified ones are gathered and written back, dense ones are not touched.
    A support keeps what it computes from its choices, as long as that stays small: the number of unified blocks, where
    they start, and the mask of the pruned ones. So its three tensors must not be changed. :meth:`copy`, pickling and
    deepcopy leave out what it keeps.

    Args:
        grid: How the weight is cut.
        kinds: ``(down, across)`` uint8, a :class:`Kind` a block.
        negative: ``(rows, n_unified, cols)`` bool, the signs in the unified blocks, in the order of
            ``kinds.flatten()``; empty where unified blocks share their sign or there are none.
    """

    def __init__(self, grid: BlockGrid, kinds: Tensor, negative: Tensor) -> None:
        self.grid, self.kinds, self.negative = grid, kinds, negative
        self._kept = _Kept()

    def __repr__(self) -> str:
        counts = ", ".join(f"{n} {kind.name.lower()}" for kind, n in self.counts().items())
        return f"Support({self.grid}, blocks: {counts})"

    def __reduce__(self) -> tuple[type[Support], tuple[BlockGrid, Tensor, Tensor]]:
        return Support, (self.grid, self.kinds, self.negative)

    @property
    def n_unified(self) -> int:
        """How many blocks are unified."""
        if self._kept.n_unified is None:
            self._kept.n_unified = int((self.kinds == Kind.UNIFIED).sum())
        return self._kept.n_unified

    @property
    def _prunes(self) -> bool:
        if self._kept.prunes is None:
            self._kept.prunes = bool((self.kinds == Kind.PRUNED).any())
        return self._kept.prunes

    def counts(self) -> dict[Kind, int]:
        """Return how many blocks there are of each kind."""
        found = torch.bincount(self.kinds.flatten().to(torch.int64), minlength=len(Kind)).tolist()
        return {kind: found[kind] for kind in Kind}

    @property
    def unsigned(self) -> Support:
        """The support of squared gradients: unified blocks share one value, sign included."""
        return Support(self.grid, self.kinds, self.negative.new_empty(0))

    @property
    def fixed(self) -> Support:
        """The directions left to a weight whose unified blocks may not move: those blocks count as pruned."""
        kinds = self.kinds.masked_fill(self.kinds == Kind.UNIFIED, int(Kind.PRUNED))
        return Support(self.grid, kinds, self.negative.new_empty(0))

    def rows(self, down: slice) -> tuple[Support, slice]:
        """Return the support of some rows of blocks, and which of the unified blocks those are."""
        before, within = (int((self.kinds[rows] == Kind.UNIFIED).sum()) for rows in (slice(down.start), down))
        ours = slice(before, before + within)
        negative = self.negative[:, ours] if self.negative.numel() else self.negative
        return Support(self.grid, self.kinds[down], negative), ours

    def copy(self) -> Support:
        """Return the same choices, in the same memory, without what this support keeps."""
        return Support(self.grid, self.kinds, self.negative)

    def to(self, device: torch.device) -> Support:
        """Return the support on a device; itself if it is on that device."""
        if self.kinds.device == device:
            return self
        return Support(self.grid, self.kinds.to(device), self.negative.to(device))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the choices as two uint8 tensors, signs eight to a byte."""
        return {"kinds": self.kinds, "negative": pack(self.negative)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], grid: BlockGrid) -> Support:
        """Return the support of a :meth:`state_dict`, on the state's device."""
        kinds, packed = state["kinds"], state["negative"]
        (rows, cols), n_unified = grid.block_shape, int((kinds == Kind.UNIFIED).sum())
        return cls(grid, kinds, unpack(packed, (rows, n_unified, cols) if len(packed) else (0,)))

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """Return the orthogonal projection on the subspace: linear, and idempotent to the bit.

        A unified block becomes ``s * mean(s * w)`` with its signs s, a pruned one zero (written, never multiplied: NaN
        and -0.0 go too); all other weights keep every bit.

        Args:
            weight: Of the shape that the support was chosen for; a weight, a gradient or a moment.

        Returns:
            Same shape, dtype and device.
        """
        return self.project_(weight.detach().clone())

    def project_(self, weight: Tensor) -> Tensor:
        """Project in place; see :meth:`project`."""
        return self._write_(weight, lambda pieces, flips, _: mean(lambda: _flip_(pieces.read(), flips)))

    def place(self, weight: Tensor, magnitudes: Tensor) -> Tensor:
        """Return ``weight`` with unified blocks of these magnitudes ``(n_unified,)``, and pruned ones zero."""
        return self.place_(weight.detach().clone(), magnitudes)

    def place_(self, weight: Tensor, magnitudes: Tensor) -> Tensor:
        """Write unified and pruned blocks in place; see :meth:`place`."""
        return self._write_(weight, lambda _, __, part: magnitudes[part])

    def fill_(self, weight: Tensor, magnitudes: Tensor) -> Tensor:
        """Write the unified blocks alone, in place; see :meth:`place`."""
        return self._write_(weight, lambda _, __, part: magnitudes[part], prune=False)

    def tie_(self, weight: Tensor) -> Tensor:
        """Zero pruned blocks and set each unified block to its first weight's magnitude, in place.

        A mean would change in the last bit at every call.
        """
        return self._write_(weight, lambda pieces, flips, _: _flipped(pieces.first(), flips, first=True))

    @torch.no_grad()
    def round_(self, weight: Tensor, step: float) -> Tensor:
        """Round to whole multiples of a step, in place: the values that a file with this step holds.

        The magnitude of a unified block is at least one step, unless it is 0. No zero has a sign.

        Args:
            weight: Inside the subspace; float32 or float64.
            step: A positive number, exact in float32.

        Example:
            >>> grid = BlockGrid((1, 2))
            >>> support = Support(grid, torch.tensor([[0, 1]], dtype=torch.uint8), torch.tensor([[[False, True]]]))
            >>> support.round_(torch.tensor([[0.1, 0.9, 0.2, -0.2]]), 0.5)
            tensor([[ 0.0000,  1.0000,  0.5000, -0.5000]])
        """
        magnitudes = self.first(weight)
        weight.div_(step).round_().mul_(step).add_(0.0)
        steps = (magnitudes.abs() / step).round_().clamp_min_(1)
        return self.fill_(weight, steps.mul_(step).mul_(magnitudes.sign()))

    @torch.no_grad()
    def first(self, weight: Tensor) -> Tensor:
        """Return ``s * w`` of each unified block's first weight, ``(n_unified,)``."""
        found = [
            _flipped(pieces.first(), flips, first=True) for pieces, flips, _ in self._unified(self._matrix(weight))
        ]
        return torch.cat(found) if found else weight.new_empty(0)

    @torch.no_grad()
    def unified_blocks(self, weight: Tensor) -> Iterator[Tensor]:
        """Yield copies of the weight's unified blocks, some at a time, ``(rows, n, cols)``, whatever their signs."""
        for pieces, _, _ in self._unified(self._matrix(weight)):
            yield pieces.read()

    @property
    def shares_signs(self) -> bool:
        """Whether the weights of a unified block are one value; False if there are no unified blocks."""
        return self.n_unified > 0 and not self.negative.numel()

    @torch.no_grad()
    def error(self, weight: Tensor) -> float:
        """Return the largest ``|weight - project(weight)|``: 0.0 exactly where the constraint holds, NaN stays NaN."""
        matrix, held = (self.grid.covered(self.grid.matrix(x)) for x in (weight, self.copy().project(weight)))
        return float((matrix - held).abs().max()) if matrix.numel() else 0.0

    def _matrix(self, weight: Tensor) -> Tensor:
        return self.grid.matrix(weight.detach()).contiguous()

    def _unified(self, matrix: Tensor) -> Iterator[tuple[Pieces, Tensor | None, slice]]:
        """Yield unified blocks, the bits whose exclusive or turns their weights into ``s * w``, and which blocks."""
        if not self.n_unified:
            return
        unit, dtype = unit_bytes(matrix, self.grid), bits(matrix).dtype
        units = [n * matrix.element_size() // unit for n in (matrix.shape[1], self.grid.block_shape[1])]
        if (corner := self._kept.corners.get((units[0], unit))) is None:
            corner = self._kept.corners[units[0], unit] = corners(self.kinds == Kind.UNIFIED, self.grid, *units)
        for part in self.grid.parts(self.n_unified, matrix):
            flips = None
            if self.negative.numel():
                flips = self.negative[:, part].to(dtype).mul_(torch.iinfo(dtype).min)
            yield Pieces(matrix, self.grid, corner[part], unit), flips, part

    @torch.no_grad()
    def _write_(
        self, weight: Tensor, values: Callable[[Pieces, Tensor | None, slice], Tensor], prune: bool = True
    ) -> Tensor:
        """Prune in place, and write ``s * values`` into the unified blocks, part by part."""
        matrix = self._matrix(weight)
        if prune and self._prunes:
            self._prune_(bits(self.grid.covered(matrix)))
        rows, cols = self.grid.block_shape
        for pieces, flips, part in self._unified(matrix):
            magnitudes = values(pieces, flips, part)
            blocks = _flipped(_run(magnitudes, cols), flips)
            if matrix.device.type != "cpu" or (magnitudes == 0).any():  # asking another device costs more than adding
                blocks = blocks + 0.0  # -0.0 + 0.0 is 0.0: a sign on zero would be one
            pieces.write_(blocks.expand(rows, -1, -1))
        if matrix.data_ptr() != weight.data_ptr():
            weight.copy_(self.grid.weight(matrix, weight.shape))
        return weight

    def _prune_(self, covered: Tensor) -> None:
        """Clear bits by a mask: dense weights pass whatever they hold, and there is no branch for each weight."""
        tall, known = self.grid.tall(covered), self._kept.masks.get(covered.dtype)
        if known is None and self._may_keep_mask(covered):
            known = self._kept.masks[covered.dtype] = self._mask(slice(None), covered.dtype)
        if known is not None:
            tall.bitwise_and_(known)
            return
        for rows in self.grid.chunks(covered):
            tall[rows].bitwise_and_(self._mask(rows, covered.dtype))

    def _mask(self, rows: slice, dtype: torch.dtype) -> Tensor:
        return self.grid.spread((self.kinds[rows] != Kind.PRUNED).to(dtype).neg_())

    def _may_keep_mask(self, covered: Tensor) -> bool:
        mask = covered.numel() // self.grid.block_shape[0] * covered.element_size()
        beside = self.kinds.numel() + self.negative.numel() + self.n_unified * (8 + covered.element_size())
        return not self._kept.masks and mask + beside <= MEMORY_RATIO * covered.numel() * covered.element_size()


def _flipped(x: Tensor, flips: Tensor | None, first: bool = False) -> Tensor:
    if flips is None:
        return x
    return bits(x).bitwise_xor(flips[0, :, 0] if first else flips).view(x.dtype)


def _flip_(x: Tensor, flips: Tensor | None) -> Tensor:
    if flips is not None:
        bits(x).bitwise_xor_(flips)
    return x


def mean(read: Callable[[], Tensor]) -> Tensor:
    """Return the mean of each block, ``(n,)`` of the blocks' dtype; of equal entries exactly that entry.

    It is finite for finite weights: a mean whose sum overflows is computed again from the blocks divided by a power of
    two, which is exact.

    Args:
        read: Returns a copy of the blocks, ``(rows, n, cols)``, which is overwritten; called once or twice.
    """
    x = read()
    found = _mean(x, 1.0)
    if x.device.type != "cpu" or not torch.isfinite(found).all():  # asking another device costs more than computing
        n_numel = x.shape[0] * x.shape[2]
        found = torch.where(torch.isfinite(found), found, _mean(read(), 0.5 ** (n_numel.bit_length() + 1)))
    return found.to(x.dtype)


def _mean(x: Tensor, scale: float) -> Tensor:
    """Return the means over axes 0 and 2, at least float32, computed on ``scale * x``; overwrites x.

    The sum is taken about the block's first entry, so that a block of one value keeps that value bit for bit.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide.mul_(scale) if scale != 1 else wide
    first = wide[0, :, 0].clone()
    total = fold(fold(wide.sub_(_run(first, x.shape[2])), 0), 2).flatten()
    return (first + total / (x.shape[0] * x.shape[2])).div_(scale)


def _run(values: Tensor, cols: int) -> Tensor:
    """Return values ``(n,)``, one a block, as ``(1, n, cols)`` in memory, to broadcast over the rows of blocks."""
    return values.unsqueeze(1).expand(-1, cols).reshape(1, -1, cols)
