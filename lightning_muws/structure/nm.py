"""N:M sparsity: of every m consecutive inputs of an output, the n largest are kept (Mishra et al. 2021, 2104.08378)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muws.errors import SettingError
from lightning_muws.structure.grid import BlockGrid, is_whole
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.structure import Choice, refuse_non_finite
from lightning_muws.structure.support import Support


@dataclass(frozen=True)
class NMStructure:
    """The set of weights with at most n non-zero values among every m consecutive inputs of each output.

    Blocks are single weights, dense or pruned. Inputs are the columns of the weight seen as the matrix
    ``(out, in * kernel)``; the last ``in * kernel % m`` of them form no group and stay dense.

    Args:
        n: How many weights of a group are kept: 1 to m - 1.
        m: Weights in a group.

    Raises:
        SettingError: A value is not allowed.

    Example:
        >>> NMStructure(n=2, m=4).project(torch.tensor([[3.0, -1.0, 0.5, 4.0]]))
        tensor([[3., 0., 0., 4.]])
    """

    n: int = 2
    m: int = 4
    block_shape = (1, 1)  # no setting: blocks are single weights

    def __post_init__(self) -> None:
        if not is_whole(self.n) or not is_whole(self.m) or not 1 <= self.n < self.m:
            raise SettingError(f"n={self.n!r} and m={self.m!r} are not allowed: give two whole numbers, 1 <= n < m")

    def counts(self, grid: BlockGrid, shape: torch.Size | tuple[int, ...]) -> dict[Kind, int]:
        """Return how many single weights stay dense and how many are pruned."""
        n_out, n_in = grid.matrix_shape(shape)
        n_pruned = n_out * (n_in // self.m) * (self.m - self.n)
        return {Kind.DENSE: n_out * n_in - n_pruned, Kind.UNIFIED: 0, Kind.PRUNED: n_pruned}

    def objection(self, grid: BlockGrid, shape: torch.Size | tuple[int, ...]) -> str:
        """Return why the structure leaves a weight of this shape as it is; empty if it changes the weight."""
        return "" if grid.matrix_shape(shape)[1] >= self.m else f"fewer than {self.m} inputs"

    def project(self, weight: Tensor, grid: BlockGrid | None = None, name: str = "weight") -> Tensor:
        """Return the nearest point of the set; see :meth:`nearest`."""
        return self.nearest(weight, grid or BlockGrid(self.block_shape), name).place(weight)

    @torch.no_grad()
    def nearest(self, weight: Tensor, grid: BlockGrid, name: str = "weight") -> Choice:
        """Return the choice of the nearest point: the n largest of each group are kept, among equal ones the first.

        Raises:
            StateError: The weight has NaN or Inf.
        """
        matrix = grid.matrix(weight.detach())
        refuse_non_finite(matrix, name)
        n_grouped = matrix.shape[1] // self.m * self.m
        groups = matrix[:, :n_grouped].abs().reshape(len(matrix), -1, self.m)
        dropped = groups.argsort(dim=2, descending=True, stable=True)[..., self.n :]
        kinds = torch.full(matrix.shape, int(Kind.DENSE), dtype=torch.uint8, device=matrix.device)
        kinds[:, :n_grouped] = kinds[:, :n_grouped].view(groups.shape).scatter(2, dropped, int(Kind.PRUNED)).flatten(1)
        return Choice(Support(grid, kinds, kinds.new_empty(0, dtype=torch.bool)), weight.new_empty(0))
