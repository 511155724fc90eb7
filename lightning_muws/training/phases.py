"""When: the phases of a run as settings, and their places on the Trainer's clock."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_muws.errors import SettingError
from lightning_muws.training.checks import check_choice, is_number, refuse
from lightning_muws.training.methods import METHODS


@dataclass(frozen=True)
class Phases:
    """When the training method starts, updates and ends, and which method it is. The Trainer owns the run's length.

    A time is a whole number of epochs (or steps), or a share of the Trainer's length if it is written as a float:
    ``3`` is the fourth epoch, ``0.3`` that after three tenths. Before ``admm_start`` the network trains dense, from
    ``admm_end`` on it retrains inside its structure. Equal times mean one projection without ADMM.

    Args:
        interval: What times count: ``epoch`` or ``step`` (batches in which an optimizer stepped).
        admm_start: When ADMM starts.
        admm_end: When the weights are projected and retraining starts.
        update_every: Time between two Z/U updates: a whole number of epochs (or steps), or a share of the ADMM phase
            if it is written as a float; within an epoch where that is shorter.
        method: The training method between ``admm_start`` and ``admm_end``: ``admm``.

    Raises:
        SettingError: A value is not allowed.
    """

    interval: Literal["epoch", "step"] = "epoch"
    admm_start: int | float = 0.2
    admm_end: int | float = 0.5
    update_every: int | float = 0.04
    method: str = "admm"

    def __post_init__(self) -> None:
        check_choice("interval", self.interval, ("epoch", "step"))
        check_choice("method", self.method, tuple(METHODS))
        for name in ("admm_start", "admm_end", "update_every"):
            value = getattr(self, name)
            whole = "ADMM phase" if name == "update_every" else "run"
            if not is_number(value) or not 0 <= value < math.inf:
                raise refuse(name, value, f"give a count of {self.interval}s >= 0 or a share of the {whole}")
            if isinstance(value, float) and value > 1:
                raise refuse(name, value, f"a float is a share of the {whole}, from 0.0 to 1.0")
        if self.update_every == 0:
            raise refuse("update_every", self.update_every, "give a count >= 1 or a share > 0")
        if type(self.admm_start) is type(self.admm_end) and self.admm_end < self.admm_start:
            raise SettingError(f"admm_end={self.admm_end} comes before admm_start={self.admm_start}: raise it")

    def on(self, length: int | None, clip: bool = False) -> Timeline:
        """Return the phases as counts, on a run of ``length`` epochs (or steps); None is a run without end.

        With ``clip``, times after the end of the run are moved to its end instead of refused.

        Raises:
            SettingError: The phases are longer than the run, or are shares of a run without end.
        """
        start, end = self._count("admm_start", length), self._count("admm_end", length)
        if end == start and self.admm_end != self.admm_start:  # a short run still gets a taste of ADMM
            start, end = (start, end + 1) if length is None or end < length else (max(0, start - 1), end)
        if clip and length is not None:
            start, end = min(start, length), min(end, length)
        if length is not None and end > length:
            raise SettingError(
                f"admm_end={self.admm_end} is after the end of the run, which is {length} {self.interval}s long: "
                f"lower admm_end or raise the Trainer's length"
            )
        if end < start:
            raise SettingError(
                f"admm_end={self.admm_end} comes before admm_start={self.admm_start} in a run of {length} "
                f"{self.interval}s: raise admm_end or lower admm_start"
            )
        every: int | float = self.update_every
        if isinstance(every, int) and end > start and every > end - start and not clip:
            raise SettingError(
                f"update_every={every} is longer than the {self.interval}s from {start} to {end} between admm_start "
                "and admm_end, so no update would happen: lower update_every, or give a share such as 0.25"
            )
        if isinstance(every, float):
            every = every * (end - start) or 1.0
        return Timeline(start, end, max(1, round(every)) if self.interval == "step" else every)

    def _count(self, name: str, length: int | None) -> int:
        value: int | float = getattr(self, name)
        if isinstance(value, int):
            return value
        if length is None:
            raise SettingError(
                f"{name}={value} is a share, and this run has no end to take it of: "
                f"give {name} as a whole number of {self.interval}s, or give the Trainer a length"
            )
        return round(value * length)


@dataclass(frozen=True)
class Timeline:
    """The phases as counts of epochs (or steps): ADMM in ``start <= now < end``, updated every ``every``."""

    start: int
    end: int
    every: int | float

    def due(self, now: float, last: float) -> int:
        """Return how many Z/U updates fell due since the time ``last``: several, where batches are rare; often none."""
        if not self.start < now < self.end:
            return 0
        # rounded up a hair: an epoch's third batch of six is half an epoch
        counts = [math.floor((time - self.start) / self.every + 1e-9) for time in (last, now)]
        return counts[1] - counts[0]


@dataclass(frozen=True)
class Retraining:
    """How the network trains on inside its structure.

    Args:
        unified: ``tied``: the one magnitude of a unified block trains, its signs stay; ``frozen``: it stays too.
        schedule: Of the learning rate. ``restart``: the module's own schedules begin anew over the retraining phase,
            with fresh optimizers; where there are none, nothing changes. ``module``: all is left alone. ``constant``,
            ``cosine``: in the place of the module's schedules, from its initial rate on.
        lr: Learning rate at the beginning of the retraining phase, of the first parameter group, the others and the
            schedules in proportion; 0 takes the module's.

    Raises:
        SettingError: A value is not allowed.
    """

    unified: Literal["tied", "frozen"] = "tied"
    schedule: Literal["restart", "module", "constant", "cosine"] = "restart"
    lr: float = 0.0

    def __post_init__(self) -> None:
        check_choice("unified", self.unified, ("tied", "frozen"))
        check_choice("schedule", self.schedule, ("restart", "module", "constant", "cosine"))
        if not is_number(self.lr) or not 0 <= self.lr < math.inf:
            raise refuse("lr", self.lr, "give a learning rate > 0, or 0 for the module's")
