"""The contract of a structure: what it answers about a weight, and the choice that it makes."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Size, Tensor

from lightning_muws.errors import SettingError, StateError
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.support import Support


class Choice(NamedTuple):
    """The nearest point of a structure to a weight, without the weight.

    Args:
        support: The kind of each block, and the signs in the unified ones.
        magnitudes: ``(n_unified,)``, one for each unified block, in the order of ``support.kinds.flatten()``.
    """

    support: Support
    magnitudes: Tensor

    def place(self, weight: Tensor) -> Tensor:
        """Return the nearest point: the weight with its unified and pruned blocks written; same shape and dtype."""
        return self.support.place(weight, self.magnitudes)


@runtime_checkable
class Structure(Protocol):
    """A set of weights with a nearest point: a union of linear subspaces, each of which a :class:`Support` describes.

    Every block of a :class:`BlockGrid` is dense, unified or pruned. A structure is a frozen dataclass whose fields are
    its settings. It does not inherit from this class: the command line shows the fields of plain dataclasses only.
    """

    @property
    def block_shape(self) -> tuple[int, int] | Literal["auto"]:
        """Outputs and inputs of a block; ``auto`` until the shape is chosen."""
        ...

    def nearest(self, weight: Tensor, grid: BlockGrid, name: str = "weight") -> Choice:
        """Return the choice of the nearest point, ``argmin |z - weight|`` over the set.

        Args:
            weight: Any floating dtype, two or more axes; half precision is computed in float32.
            grid: How the weight is cut into blocks of ``block_shape``.
            name: The weight's name in error messages.

        Raises:
            StateError: The weight has NaN or Inf.
        """
        ...

    def counts(self, grid: BlockGrid, shape: Size | tuple[int, ...]) -> dict[Kind, int]:
        """Return how many blocks of each kind :meth:`nearest` makes of a weight of this shape."""
        ...

    def objection(self, grid: BlockGrid, shape: Size | tuple[int, ...]) -> str:
        """Return why the structure leaves a weight of this shape as it is; empty if it changes the weight."""
        ...

    def project(self, weight: Tensor, grid: BlockGrid | None = None, name: str = "weight") -> Tensor:
        """Return the nearest point itself; by default the weight's outputs are on axis 0. See :meth:`nearest`."""
        ...


def check_structure(value: object) -> None:
    """Check that a setting is a structure.

    Raises:
        SettingError: It is not, or it is a class and not an instance.
    """
    if isinstance(value, type) or not isinstance(value, Structure):
        raise SettingError(
            f"structure={value!r} is not allowed: give a structure, such as MicroStructure(prune_ratio=0.8)"
        )


def refuse_non_finite(matrix: Tensor, name: str) -> None:
    """Check that a weight has finite values only, before a structure chooses among them.

    Raises:
        StateError: The weight has NaN or Inf.
    """
    if n_bad := int((~torch.isfinite(matrix)).sum()):
        raise StateError(
            f"{name} holds {n_bad} values of {matrix.numel()} that are NaN or Inf: a structure is chosen among "
            "finite weights only, so lower the learning rate or clip the gradient"
        )
