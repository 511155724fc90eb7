"""The largest compression at which a metric is predicted to drop by no more than is allowed. Knows no Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_muws.errors import SettingError, StateError
from lightning_muws.structure.budget import RECOVERY, Allocation
from lightning_muws.structure.micro import MicroStructure
from lightning_muws.structure.plan import PlanEntry, clean_name
from lightning_muws.structure.sharded import like, whole
from lightning_muws.structure.stored import as_stored
from lightning_muws.training.budget import Budget, open_structures
from lightning_muws.training.checks import is_number, refuse

Metric = TypeVar("Metric", float, Tensor)
LEAST = 2.0  # the smallest compression that is tried
N_PROBES = 6  # of a bisection: from 2 to 200 times smaller, the last two are 7 % apart
SMALLER = ("loss", "error")  # metrics whose names have one of these are better where they are smaller


@dataclass(frozen=True)
class Drop:
    """How far a monitored metric may become worse.

    Args:
        most: The largest drop allowed, in units of the metric: 0 or more.
        monitor: The name of the metric. Larger is better, unless the name has ``loss`` or ``error`` in it or begins
            with ``-``, which is not part of the name: ``-val_rmse``.

    Raises:
        SettingError: A value has a wrong type or is not allowed.

    Example:
        >>> round(Drop(0.005, "val_accuracy").of(0.92, 0.90), 3), round(Drop(0.1, "val_loss").of(0.2, 0.25), 3)
        (0.02, 0.05)
    """

    most: float
    monitor: str

    def __post_init__(self) -> None:
        if not is_number(self.most) or not 0 <= self.most < math.inf:
            raise refuse("max_drop", self.most, "give how much the metric may drop, such as 0.005")
        monitor: object = self.monitor  # a configuration file may have put anything there
        if not isinstance(monitor, str) or not self.metric:
            raise refuse("monitor", self.monitor, "with max_drop, give the name of a metric, such as 'val_accuracy'")

    @property
    def metric(self) -> str:
        """The name of the metric."""
        return self.monitor.removeprefix("-")

    @property
    def is_smaller_better(self) -> bool:
        """Whether the metric is better where it is smaller."""
        return self.monitor.startswith("-") or any(word in self.metric.lower() for word in SMALLER)

    @property
    def asked(self) -> str:
        """The setting of a callback that asks for it."""
        return "max_drop"

    def __str__(self) -> str:
        """Return what is asked, such as ``max_drop=0.005``."""
        return f"{self.asked}={self.most:g}"

    def check(self, module: nn.Module, entries: Mapping[str, PlanEntry]) -> None:
        """Check that a compression of ``LEAST`` can be reached.

        Raises:
            SettingError: It cannot.
            StateError: A parameter has NaN or Inf.
        """
        try:
            Budget(LEAST).check(module, entries)
        except SettingError as error:
            raise SettingError(
                f"{self} needs a network that can be made at least {LEAST:g} x smaller: {error}"
            ) from None

    def resumed(self, state: Mapping[str, Any]) -> DropReport:
        """Return the report that a checkpoint has.

        Raises:
            StateError: It is of another drop.
        """
        found = DropReport(**state)
        if (found.max_drop, found.monitor) != (self.most, self.monitor):
            raise StateError(
                f"the checkpoint has max_drop={found.max_drop!r} of monitor={found.monitor!r}, and the settings have "
                f"{self.most!r} of {self.monitor!r}: resume with the settings of the checkpoint, or begin a new fit "
                "from its weights alone"
            )
        return found

    def of(self, baseline: float, value: float) -> float:
        """Return how much worse ``value`` is than ``baseline``; negative if it is better, infinite if it is NaN."""
        drop = value - baseline if self.is_smaller_better else baseline - value
        return math.inf if math.isnan(drop) else drop

    def find(self, metrics: Mapping[str, Metric]) -> Metric:
        """Return the metric.

        Raises:
            SettingError: There is no such metric; the message has the names of those there are.
        """
        if self.metric in metrics:
            return metrics[self.metric]
        found = f"logs {', '.join(sorted(metrics))}" if metrics else "logs no metric"
        raise SettingError(
            f"monitor={self.monitor!r} is unknown: the validation {found}; name one of them, or log it in "
            "validation_step, also while trainer.sanity_checking is true"
        )


@dataclass(frozen=True)
class DropReport:
    """The drop of a monitored metric that was allowed, predicted and measured.

    Args:
        monitor: As in :class:`Drop`.
        max_drop: The largest drop allowed.
        baseline: The metric of the dense network when the method started.
        compression: The compression that was chosen.
        predicted: The drop that was predicted for it.
        probes: Each compression that was tried, with its predicted drop, in the order they were tried.
        measured: The metric at the end of training, of the weights as the file holds them; None before.
    """

    monitor: str
    max_drop: float
    baseline: float
    compression: float
    predicted: float
    probes: tuple[tuple[float, float], ...] = ()
    measured: float | None = None

    @property
    def drop(self) -> float | None:
        """The drop at the end of training; None before."""
        return None if self.measured is None else Drop(self.max_drop, self.monitor).of(self.baseline, self.measured)

    @property
    def doubt(self) -> str:
        """Why the choice is doubtful, as the end of a sentence; empty if it is not."""
        if self.predicted > self.max_drop:
            return f"; even this is more than {self.max_drop:g}, and less compression is not tried"
        if self.probes and not any(predicted for _, predicted in self.probes):
            return f"; no compression did any harm: if {self.monitor} is better where it is smaller, put '-' before it"
        return ""

    @property
    def is_kept(self) -> bool | None:
        """Whether the drop is at most the one allowed; None before the end of training."""
        return None if self.drop is None else self.drop <= self.max_drop

    def __str__(self) -> str:
        """Return a sentence."""
        chosen = f"compression={self.compression:g} was chosen, with a predicted drop of {self.predicted:.4g}"
        if self.measured is None or self.drop is None:
            return f"max_drop={self.max_drop:g} of {self.monitor}: {chosen}"
        return (
            f"max_drop={self.max_drop:g} of {self.monitor} was {'kept' if self.is_kept else 'missed'}: "
            f"{self.measured:.4f} after {self.baseline:.4f} is a drop of {self.drop:.4g}; {chosen}"
        )


def choose_compression(
    drop: Drop,
    measure: Callable[[Allocation | None, float], float],
    module: nn.Module,
    entries: Mapping[str, PlanEntry],
    n_probes: int = N_PROBES,
    *,
    will_round: bool = False,
) -> DropReport:
    """Return the largest compression whose predicted drop is allowed, by bisection over its logarithm.

    Training repairs most of what projecting does, and nothing of what rounding does if that comes after it. So the
    prediction is ``rounding + RECOVERY * (both - rounding)``, with the measured drops of the network that is only
    rounded, and of the one that is projected and rounded. If retraining rounds, it is ``RECOVERY * both``.

    Args:
        drop: How far the metric may drop.
        measure: Returns the metric of the network compressed as in an allocation, with a share ``recovery`` of the
            distance to its projection, as :func:`compressed` gives it; of the network as it is for None.
        module: The network when the method starts.
        entries: The covered weights, with open structures.
        n_probes: How many compressions are tried.
        will_round: Whether retraining rounds: see :meth:`lightning_muws.CompressionRun.choose_structures`.

    Raises:
        SettingError: The network cannot be even ``LEAST`` times smaller.
        StateError: The metric of the network as it is is not finite, or a weight has NaN or Inf.
    """
    baseline = measure(None, 1.0)
    if not math.isfinite(baseline):
        raise StateError(f"{drop.metric} is {baseline} when the method starts: a drop from it cannot be measured")

    def predict(compression: float) -> float:
        allocation = Budget(compression).allocate(module, entries, 1.0 if will_round else RECOVERY)
        both = drop.of(baseline, measure(allocation, 1.0))
        if will_round or RECOVERY * both > drop.most:  # too much, even if rounding does nothing
            return max(0.0, RECOVERY * both)
        rounding = max(0.0, drop.of(baseline, measure(allocation, 0.0)))
        return rounding + RECOVERY * max(0.0, both - rounding)

    low, high = LEAST, Budget(LEAST).allocate(module, entries).reachable[1]
    probes: list[tuple[float, float]] = []

    def is_allowed(compression: float) -> bool:
        probes.append((compression, predict(compression)))
        return probes[-1][1] <= drop.most

    for _ in range(n_probes):
        middle = float(f"{math.sqrt(low * high):.3g}")
        low, high = (middle, high) if is_allowed(middle) else (low, middle)
    if low == LEAST:
        is_allowed(low)
    return DropReport(drop.monitor, drop.most, baseline, low, dict(probes)[low], tuple(probes))


@contextmanager
def compressed(
    module: nn.Module, entries: Mapping[str, PlanEntry], allocation: Allocation | None, recovery: float = 1.0
) -> Iterator[None]:
    """Give a module the weights that a file with this allocation holds; at the end, those it had, bit for bit.

    Buffers stay as they are: a file keeps at least float16 of them. One tensor is computed at a time, and all raw ones
    are kept meanwhile.

    Args:
        module: The network.
        entries: Its covered weights.
        allocation: What each tensor gets; None to change nothing.
        recovery: See :func:`lightning_muws.structure.stored.as_stored`.

    Raises:
        StateError: A weight has NaN or Inf.
    """
    raw: list[tuple[nn.Parameter, Tensor]] = []
    is_open = open_structures(entries)
    shares = allocation.shares if allocation else {}
    try:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                name = clean_name(name)
                if (share := shares.get(name)) is None or not parameter.is_floating_point():
                    continue
                entry = entries.get(name)
                structure = share.structure if name in is_open or entry is None else entry.structure
                grid = entry.grid if entry else None
                if grid and isinstance(structure, MicroStructure):  # its block shape may be another one
                    grid = replace(grid, block_shape=structure.grid.block_shape)
                stored = as_stored(whole(parameter.detach()), share.step, structure, grid, recovery, name)
                raw.append((parameter, parameter.detach().clone()))
                parameter.copy_(like(stored, parameter))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in raw:
                parameter.copy_(value)
