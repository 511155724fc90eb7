"""Micro-structures: sets of weights, and the nearest point of each (Lin et al. 2021, arXiv:2106.08301)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal

import torch
from torch import Tensor

from lightning_muws.errors import SettingError, StateError
from lightning_muws.structure.bits import pack, unpack
from lightning_muws.structure.blocks import BlockGrid
from lightning_muws.structure.choose import cheapest

SCALE = 2.0**64  # weights whose squares overflow are ranked divided by it, which is exact


class Kind(IntEnum):
    """What becomes of a block. These numbers are in files: append, never renumber."""

    DENSE = 0
    UNIFIED = 1
    PRUNED = 2


@dataclass(frozen=True)
class MicroStructure:
    """The set of weights of which given shares of the blocks are pruned, and unified.

    Args:
        block_shape: Outputs and inputs of a block, on the weight seen as the matrix ``(out, in * kernel)``.
        prune_ratio: Share of the blocks that are all zero, in [0, 1]; ``round(prune_ratio * n_blocks)`` of a weight's.
        unify_ratio: Share of the blocks whose weights share one magnitude, in [0, 1]; with prune_ratio at most 1.
        signs: In a unified block, ``free``: each weight keeps its sign; ``shared``: all weights are one value.

    Raises:
        SettingError: A value is not allowed.

    Example:
        >>> MicroStructure(block_shape=(1, 2), unify_ratio=0.5).project(torch.tensor([[3.0, -1.0], [5.0, 5.0]]))
        tensor([[ 3., -1.],
                [ 5.,  5.]])
    """

    block_shape: tuple[int, int] = (4, 4)
    prune_ratio: float = 0.0
    unify_ratio: float = 0.0
    signs: Literal["free", "shared"] = "free"

    def __post_init__(self) -> None:
        BlockGrid(self.block_shape)  # refuses a wrong shape
        object.__setattr__(self, "block_shape", tuple(self.block_shape))
        for name in ("prune_ratio", "unify_ratio"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise SettingError(f"{name}={value!r} is not allowed: give a share of the blocks from 0 to 1")
        if self.prune_ratio + self.unify_ratio > 1 + 1e-9:
            raise SettingError(
                f"prune_ratio={self.prune_ratio} and unify_ratio={self.unify_ratio} sum to more than 1: "
                "they are shares of all blocks, so lower one of them"
            )
        if self.signs not in ("free", "shared"):
            raise SettingError(f"signs={self.signs!r} is not allowed: give 'free' or 'shared'")

    @property
    def grid(self) -> BlockGrid:
        """The grid of its blocks on a weight whose outputs are on axis 0."""
        return BlockGrid(self.block_shape)

    def quotas(self, n_blocks: int) -> tuple[int, int]:
        """Return how many of ``n_blocks`` blocks are pruned, and unified."""
        n_pruned = round(self.prune_ratio * n_blocks)
        return n_pruned, min(round(self.unify_ratio * n_blocks), n_blocks - n_pruned)

    def project(self, weight: Tensor, grid: BlockGrid | None = None, name: str = "weight") -> Tensor:
        """Return the nearest point of the set, ``argmin |z - weight|``.

        A unified block becomes ``sign(w) * mean(|w|)`` (``mean(w)`` with shared signs) at a cost of ``n * Var(|w|)``,
        a pruned one zero at a cost of ``|w|^2``; which blocks, with both ratios given, is decided jointly.

        Args:
            weight: Any floating dtype, 2 or more axes; half precision is worked on in float32.
            grid: How the weight is cut; outputs on axis 0 where it is not given.
            name: What an error calls the weight.

        Returns:
            Same shape, dtype and device. Edges and dense blocks are returned bit for bit.

        Raises:
            StateError: The weight has NaN or Inf.
        """
        support, magnitudes = self.nearest(weight, grid, name)
        return support.place(weight, magnitudes)

    def support(self, weight: Tensor, grid: BlockGrid | None = None, name: str = "weight") -> Support:
        """Return the choice that :meth:`project` makes, frozen: each block's kind, and the signs."""
        return self.nearest(weight, grid, name)[0]

    @torch.no_grad()
    def nearest(self, weight: Tensor, grid: BlockGrid | None = None, name: str = "weight") -> tuple[Support, Tensor]:
        """Return the support that :meth:`project` chooses, and each block's magnitude.

        Returns:
            The support, and ``(down, across)`` of the weight's dtype: ``mean(|w|)``, or ``mean(w)`` with shared signs,
            of each unified block, and 0 of each other.

        Raises:
            StateError: The weight has NaN or Inf.
        """
        grid = grid or self.grid
        matrix = grid.matrix(weight.detach())
        covered = grid.covered(matrix)
        magnitudes, unify_cost, gain = self._costs(covered, grid, 1.0)
        if not torch.isfinite(gain + unify_cost).all() or not all(torch.isfinite(e).all() for e in grid.edges(matrix)):
            if n_bad := int((~torch.isfinite(matrix)).sum()):
                raise StateError(
                    f"{name} holds {n_bad} values of {matrix.numel()} that are NaN or Inf: a structure is chosen among "
                    "finite weights only, so lower the learning rate or clip the gradient"
                )
            magnitudes, unify_cost, gain = self._costs(covered, grid, 1 / SCALE)
        n_pruned, n_unified = self.quotas(gain.numel())
        pruned, unified = cheapest(unify_cost.flatten(), gain.flatten(), n_pruned, n_unified)
        kinds = (unified * int(Kind.UNIFIED) + pruned * int(Kind.PRUNED)).to(torch.uint8).view(gain.shape)
        negative = (
            torch.signbit(covered)
            if self.signs == "free" and n_unified
            else covered.new_empty((0, 0), dtype=torch.bool)
        )
        magnitudes = magnitudes.to(weight.dtype).masked_fill_(kinds != Kind.UNIFIED, 0)
        return Support(grid, kinds, negative), magnitudes

    def _costs(self, covered: Tensor, grid: BlockGrid, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return each block's magnitude, the squared distance of unifying it, and what pruning adds to that."""
        tall, n = grid.tall(covered), grid.block_numel
        dtype = torch.promote_types(covered.dtype, torch.float32)
        magnitudes = torch.empty(
            tall.shape[0], covered.shape[1] // grid.block_shape[1], dtype=dtype, device=covered.device
        )
        unify_cost, gain = torch.empty_like(magnitudes), torch.empty_like(magnitudes)
        for rows in grid.chunks(covered):
            x = tall[rows].to(dtype)
            x = x.abs() if self.signs == "free" else x.clone()
            if scale != 1:
                x.mul_(scale)
            # About the block's first entry: exact for a block of one value, and as the entry is one of the block's,
            # the variance loses at most log2(n) bits (Chan, Golub and LeVeque 1983, shifted data).
            first = grid.first(x).clone()
            x.sub_(grid.spread(first))
            shift = grid.sum(x) / n
            unify_cost[rows] = (grid.sum(x.square_()) - n * shift.square()).clamp_min_(0)
            mean = first + shift
            gain[rows] = n * mean.square()
            magnitudes[rows] = mean / scale
        return magnitudes, unify_cost, gain


@dataclass(frozen=True)
class Support:
    """A structure with its choices made: what is left is a linear subspace, for weights, gradients and moments alike.

    Args:
        grid: How the weight is cut.
        kinds: ``(down, across)`` uint8, a :class:`Kind` a block.
        negative: ``(down * rows, across * cols)`` bool, the signs of the covered weights; ``(0, 0)`` where unified
            blocks share their sign or there are none.
    """

    grid: BlockGrid
    kinds: Tensor
    negative: Tensor

    def counts(self) -> dict[Kind, int]:
        """Return how many blocks there are of each kind."""
        found = torch.bincount(self.kinds.flatten().to(torch.int64), minlength=len(Kind)).tolist()
        return {kind: found[kind] for kind in Kind}

    @property
    def unsigned(self) -> Support:
        """The support of squared gradients: unified blocks share one value, sign included."""
        return replace(self, negative=self.negative.new_empty((0, 0)))

    @property
    def fixed(self) -> Support:
        """The directions left to a weight whose unified blocks may not move: those blocks count as pruned."""
        return replace(self, kinds=self.kinds.masked_fill(self.kinds == Kind.UNIFIED, int(Kind.PRUNED)))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the choices as two uint8 tensors, signs eight to a byte."""
        return {"kinds": self.kinds, "negative": pack(self.negative)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], grid: BlockGrid) -> Support:
        """Return the support that :meth:`state_dict` described, on the state's device."""
        kinds, packed = state["kinds"], state["negative"]
        covered = [n * size for n, size in zip(kinds.shape, grid.block_shape, strict=True)]
        return cls(grid, kinds, unpack(packed, covered if len(packed) else (0, 0)))

    @torch.no_grad()
    def project(self, weight: Tensor) -> Tensor:
        """Return the orthogonal projection on the subspace: linear, and idempotent to the bit.

        A unified block becomes ``s * mean(s * w)`` with its signs s, a pruned one zero (written, never multiplied: NaN
        and -0.0 go too); all else is returned bit for bit.

        Args:
            weight: Of the shape that the support was chosen for; a gradient or a moment serves as well.

        Returns:
            Same shape, dtype and device.
        """
        return self.place(weight, self.means(weight))

    @torch.no_grad()
    def project_(self, weight: Tensor) -> Tensor:
        """Project in place; see :meth:`project`."""
        return self.place_(weight, self.means(weight))

    @torch.no_grad()
    def means(self, weight: Tensor) -> Tensor:
        """Return ``mean(s * w)`` of each unified block, 0 of each other: ``(down, across)``, the weight's dtype."""
        covered = self.grid.covered(self.grid.matrix(weight))
        means = torch.zeros(self.kinds.shape, dtype=weight.dtype, device=weight.device)
        if not (self.kinds == Kind.UNIFIED).any():
            return means
        tall, dtype = self.grid.tall(covered), torch.promote_types(weight.dtype, torch.float32)
        for rows in self.grid.chunks(covered):
            means[rows] = self.grid.mean(self._signed(tall[rows], rows).to(dtype))
        return means.masked_fill_(self.kinds != Kind.UNIFIED, 0)

    @torch.no_grad()
    def first(self, weight: Tensor) -> Tensor:
        """Return ``s * w`` of each unified block's first weight, 0 of each other block: ``(down, across)``."""
        covered = self.grid.covered(self.grid.matrix(weight))
        first = self.grid.first(self.grid.tall(covered))
        if self.negative.numel():
            first = torch.where(self.grid.first(self.grid.tall(self.negative)), -first, first)
        return first.masked_fill(self.kinds != Kind.UNIFIED, 0)

    def place(self, weight: Tensor, magnitudes: Tensor) -> Tensor:
        """Return ``weight`` with unified blocks of these magnitudes ``(down, across)``, and pruned ones zero."""
        return self.place_(weight.detach().clone(), magnitudes)

    @torch.no_grad()
    def place_(self, weight: Tensor, magnitudes: Tensor) -> Tensor:
        """Write unified and pruned blocks in place; see :meth:`place`."""
        matrix = self.grid.matrix(weight)
        covered = self.grid.covered(matrix)
        tall = self.grid.tall(covered)
        # On the bits: dense weights pass whatever they hold, zeros are written, and no branch is taken for a weight.
        sign = torch.iinfo(_bits(magnitudes).dtype).min
        keep = (self.kinds == Kind.DENSE).to(_bits(magnitudes).dtype).neg_()
        signed = (magnitudes != 0).to(keep.dtype).mul_(sign)  # a sign on zero would make -0.0
        magnitudes = _bits(magnitudes + 0.0)
        for rows in self.grid.chunks(covered):
            values = self.grid.spread(magnitudes[rows])
            if self.negative.numel():
                flip = self.grid.tall(self.negative)[rows].to(keep.dtype).neg_()
                values = flip.bitwise_and_(self.grid.spread(signed[rows])).bitwise_xor_(values)
            _bits(tall[rows]).bitwise_and_(self.grid.spread(keep[rows])).bitwise_or_(values)
        if matrix.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
            weight.copy_(self.grid.weight(matrix, weight.shape))
        return weight

    @torch.no_grad()
    def error(self, weight: Tensor) -> float:
        """Return the largest ``|weight - project(weight)|``: 0.0 exactly where the constraint holds, NaN stays NaN."""
        matrix, held = (self.grid.covered(self.grid.matrix(x)) for x in (weight, self.project(weight)))
        return float((matrix - held).abs().max()) if matrix.numel() else 0.0

    def _signed(self, tall: Tensor, rows: slice) -> Tensor:
        """Return ``s * w`` for a slice of block rows."""
        if not self.negative.numel():
            return tall
        bits = _bits(tall)
        flip = self.grid.tall(self.negative)[rows].to(bits.dtype).mul_(torch.iinfo(bits.dtype).min)
        return flip.bitwise_xor_(bits).view(tall.dtype)


def _bits(x: Tensor) -> Tensor:
    """Return the same memory as integers of the same width."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
