"""A budget in a run: the structures of all weights, chosen once for one size of the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_muws.structure.budget import Allocation, Bounds, allocate
from lightning_muws.structure.cost import check_compression
from lightning_muws.structure.micro import MicroStructure
from lightning_muws.structure.plan import PlanEntry, clean_name

KEPT = "the budget keeps it dense"  # the plan's reason


@dataclass(frozen=True)
class Budget:
    """A size for the file of the whole network, in place of ratios for each weight.

    The structures of open weights, which have both ratios 0, are chosen for it. All other structures stay as they are.

    Args:
        compression: How many times smaller than the tensors of the module the file shall be, above 1.

    Raises:
        SettingError: The compression is not a finite number above 1.
    """

    compression: float = 20.0

    def __post_init__(self) -> None:
        check_compression(self.compression)

    @torch.no_grad()
    def allocate(self, module: nn.Module, entries: Mapping[str, PlanEntry]) -> Allocation:
        """Return how the budget is shared out among the tensors of a module, at their present values.

        A collective where tensors are sharded. The result is the same on all ranks whose parameters have the same bits.

        Args:
            module: Its state_dict is what the file will hold.
            entries: The covered weights, by name: the ``covered`` of a plan made with ``open_ratios=True``.

        Raises:
            SettingError: The compression cannot be reached; the message has the range that can.
            StateError: A parameter has NaN or Inf.
        """
        parameters, buffers = _stored(module)
        bounds = {name: Bounds.of(entry) for name, entry in entries.items()}
        return allocate(parameters | buffers, bounds, self.compression, buffers=buffers)

    def choose(self, module: nn.Module, entries: Mapping[str, PlanEntry]) -> dict[str, MicroStructure]:
        """Return the structure of each open weight, by name; both its ratios are 0 if the weight stays dense.

        See :meth:`allocate`.
        """
        structures = self.allocate(module, entries).structures
        return {name: structures.get(name, given) for name, given in open_structures(entries).items()}


def open_structures(entries: Mapping[str, PlanEntry]) -> dict[str, MicroStructure]:
    """Return the structures whose ratios a budget chooses, by the names of their weights."""
    structures = {name: entry.structure for name, entry in entries.items()}
    return {name: s for name, s in structures.items() if isinstance(s, MicroStructure) and s.is_open}


def settled(entries: Mapping[str, PlanEntry], chosen: Mapping[str, MicroStructure]) -> dict[str, PlanEntry]:
    """Return the entries with the structures that a budget chose; those of weights that stay dense have a reason."""

    def settle(entry: PlanEntry) -> PlanEntry:
        structure = chosen.get(entry.name)
        if structure is None:
            return entry
        return replace(entry, structure=structure, reason=KEPT if structure.is_open else "")

    return {name: settle(entry) for name, entry in entries.items()}


def _stored(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the parameters and the buffers that a module's file holds, by name; shared ones once.

    Their order is that of the module: the same on all ranks, which gather sharded tensors one after the other.
    """
    stored = module.state_dict().keys()  # not all buffers are persistent
    parameters, buffers = (
        {clean_name(name): x.detach() for name, x in tensors if name in stored}
        for tensors in (module.named_parameters(), module.named_buffers())
    )
    return parameters, buffers
