"""A budget in a run: the structures of all weights, chosen once for one size, speed or error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_muws.errors import SettingError
from lightning_muws.structure.budget import RECOVERY, Allocation, allocate, prepare
from lightning_muws.structure.cost import check_compression, check_speedup
from lightning_muws.structure.layer import Bounds
from lightning_muws.structure.micro import MicroStructure
from lightning_muws.structure.plan import PlanEntry, clean_name
from lightning_muws.structure.shapes import nearest_grid
from lightning_muws.structure.sharded import whole
from lightning_muws.structure.speed import NetworkTimes, TimeAllocation, allocate_time
from lightning_muws.structure.tolerance import check_max_relative_error, within

KEPT = "the budget keeps it dense"  # the plan's reason


@dataclass(frozen=True)
class Budget:
    """One number for the whole network, in place of ratios for each weight. Give exactly one of the three.

    The structures of open weights, which have both ratios 0, are chosen for it. All other structures stay as they are.
    A speedup chooses block shapes, too, where the open structure has the default one or ``auto``.

    Args:
        compression: How many times smaller than the tensors of the module the file shall be, above 1.
        speedup: How many times faster than the best dense form of the network the compressed one shall be, above 1,
            once :func:`lightning_muws.accelerate` has swapped its layers.
        max_relative_error: The largest relative error of a block that is unified or pruned, above 0 and below 1: see
            :func:`lightning_muws.structure.tolerance.within`.

    Raises:
        SettingError: Not exactly one is given, or its value is not allowed.

    Example:
        >>> Budget(20) == Budget(compression=20), str(Budget(max_relative_error=0.3))
        (True, 'max_relative_error=0.3')
    """

    compression: float | None = None
    speedup: float | None = None
    max_relative_error: float | None = None

    def __post_init__(self) -> None:
        given = [f"{name}={value!r}" for name, value in vars(self).items() if value is not None]
        if len(given) > 1:
            raise SettingError(f"{' and '.join(given)} contradict each other: give one of {', '.join(vars(self))}")
        if not given:
            raise SettingError(
                "compression=None is not allowed: give a finite number above 1, such as 20, or in its place a speedup "
                "or a max_relative_error"
            )
        if self.speedup is not None:
            check_speedup(self.speedup)
        elif self.max_relative_error is not None:
            check_max_relative_error(self.max_relative_error)
        else:
            check_compression(self.compression)

    @property
    def asked(self) -> str:
        """The name of the field that is given."""
        return next(name for name, value in vars(self).items() if value is not None)

    def __str__(self) -> str:
        """Return what is asked, such as ``compression=20``."""
        return f"{self.asked}={getattr(self, self.asked):g}"

    @torch.no_grad()
    def allocate(self, module: nn.Module, entries: Mapping[str, PlanEntry], recovery: float = RECOVERY) -> Allocation:
        """Return how a compression is shared out among the tensors of a module, at their present values.

        A collective where tensors are sharded. The result is the same on all ranks whose parameters have the same bits.

        Args:
            module: Its state_dict is what the file will hold.
            entries: The covered weights, by name: the ``covered`` of a plan made with ``open_ratios=True``.
            recovery: See :func:`lightning_muws.structure.budget.allocate`.

        Raises:
            SettingError: The compression cannot be reached; the message has the range that can. Or the budget is none
                of a compression.
            StateError: A parameter has NaN or Inf.
        """
        tensors, bounds, compression, buffers = self._sized(module, entries)
        return allocate(tensors, bounds, compression, buffers=buffers, recovery=recovery)

    def _sized(
        self, module: nn.Module, entries: Mapping[str, PlanEntry]
    ) -> tuple[dict[str, Tensor], dict[str, Bounds], float, dict[str, Tensor]]:
        """Return what an allocation needs: tensors, the bounds of the covered ones, the compression, the buffers."""
        if self.compression is None:
            raise SettingError(f"{self} has no size to share out: give Budget(compression=...)")
        parameters, buffers = _stored(module)
        bounds = {name: Bounds.of(entry) for name, entry in entries.items()}
        return parameters | buffers, bounds, self.compression, buffers

    @torch.no_grad()
    def allocate_time(
        self, module: nn.Module, entries: Mapping[str, PlanEntry], times: NetworkTimes | None
    ) -> TimeAllocation:
        """Return how a speedup is shared out among the weights of a module, at their present values.

        A collective where tensors are sharded. The result is the same on all ranks that have the same times, and whose
        parameters have the same bits.

        Args:
            module: The network.
            entries: The covered weights, by name: the ``covered`` of a plan made with ``open_ratios=True``.
            times: What the layers take, of :func:`lightning_muws.layer_times`.

        Raises:
            SettingError: The speedup cannot be reached; the message has the range that can. Or there are no times, or
                the budget is none of a speedup.
            StateError: A parameter has NaN or Inf.
        """
        if self.speedup is None:
            raise SettingError(f"{self} has no time to share out: give Budget(speedup=...)")
        if times is None:
            raise SettingError(
                f"{self} needs the times of the layers: give times=layer_times(module, example_input, plan.covered)"
            )
        parameters = _stored(module)[0]
        bounds = {name: Bounds.of(entries[name]) for name in open_structures(entries)}
        return allocate_time(parameters, bounds, times, self.speedup)

    def choose(
        self,
        module: nn.Module,
        entries: Mapping[str, PlanEntry],
        times: NetworkTimes | None = None,
        recovery: float = RECOVERY,
    ) -> dict[str, MicroStructure]:
        """Return the structure of each open weight, by name; both its ratios are 0 if the weight stays dense.

        A collective where tensors are sharded. The result is the same on all ranks whose parameters have the same bits.

        Args:
            module: The network; its state_dict is what the file will hold.
            entries: The covered weights, by name: the ``covered`` of a plan made with ``open_ratios=True``.
            times: What the layers take; needed for a speedup.
            recovery: For a compression: see :func:`lightning_muws.structure.budget.allocate`.

        Raises:
            SettingError: The budget cannot be met; the message has what can.
            StateError: A parameter has NaN or Inf.
        """
        if self.speedup is not None:
            found: Mapping[str, MicroStructure] = self.allocate_time(module, entries, times).structures
        elif self.max_relative_error is not None:
            found = self._within_error(module, entries)
        else:
            found = self.allocate(module, entries, recovery).structures
        return {name: found.get(name, dense(entries[name])) for name in open_structures(entries)}

    @torch.no_grad()
    def check(self, module: nn.Module, entries: Mapping[str, PlanEntry], times: NetworkTimes | None = None) -> None:
        """Check that the budget can be met, in less time than :meth:`choose`, whose arguments and errors it has."""
        if self.compression is None:
            self.choose(module, entries, times)
        else:
            tensors, bounds, compression, buffers = self._sized(module, entries)
            first = {name: replace(bound, is_auto=False) for name, bound in bounds.items()}
            try:
                prepare(tensors, first, compression, buffers=buffers)
            except SettingError:
                if first == bounds:
                    raise
                prepare(tensors, bounds, compression, buffers=buffers)  # other block shapes may reach it

    def _within_error(self, module: nn.Module, entries: Mapping[str, PlanEntry]) -> dict[str, MicroStructure]:
        assert self.max_relative_error is not None  # noqa: S101  choose() calls this for an error only
        parameters, error = _stored(module)[0], self.max_relative_error
        return {n: within(n, parameters[n], Bounds.of(entries[n]), error) for n in open_structures(entries)}


def open_structures(entries: Mapping[str, PlanEntry]) -> dict[str, MicroStructure]:
    """Return the structures that are still to be chosen, in their ratios or their block shape, by name."""
    structures = {name: entry.structure for name, entry in entries.items()}
    return {
        name: s
        for name, s in structures.items()
        if isinstance(s, MicroStructure) and (s.is_open or s.block_shape == "auto")
    }


@torch.no_grad()
def choose_shapes(weights: Mapping[str, Tensor], entries: Mapping[str, PlanEntry]) -> dict[str, MicroStructure]:
    """Return the structures with an ``auto`` block shape and set ratios, with the shape of the least distance, by name.

    It needs no budget. A collective where tensors are sharded.

    Args:
        weights: The covered weights, by name.
        entries: Their entries; no structure is open in its ratios.

    Raises:
        StateError: A weight has NaN or Inf.
    """
    found = {}
    for name, structure in open_structures(entries).items():
        grid = nearest_grid(whole(weights[name]), structure, entries[name].grid, name)
        found[name] = replace(structure, block_shape=grid.block_shape)
    return found


def dense(entry: PlanEntry) -> MicroStructure:
    """Return the structure of a weight for which a budget chooses nothing: its set ratios, or none."""
    structure = entry.structure
    if not isinstance(structure, MicroStructure) or structure.is_open:
        return MicroStructure(entry.grid.block_shape)
    return replace(structure, block_shape=entry.grid.block_shape)


def settled(entries: Mapping[str, PlanEntry], chosen: Mapping[str, MicroStructure]) -> dict[str, PlanEntry]:
    """Return the entries with the structures that were chosen; those of weights that stay dense have a reason."""

    def settle(entry: PlanEntry) -> PlanEntry:
        structure = chosen.get(entry.name)
        if structure is None or structure.block_shape == "auto":
            return entry
        grid = replace(entry.grid, block_shape=structure.block_shape)
        return replace(entry, structure=structure, grid=grid, reason=KEPT if structure.is_open else "")

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
