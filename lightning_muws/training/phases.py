"""The phases of a run: when the training method, retraining and rounding start, as settings and as counts of epochs."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from lightning_muws.errors import SettingError
from lightning_muws.training.checks import check_choice, is_number, refuse
from lightning_muws.training.methods import AUTO, METHODS, ONE_SHOT, ignored
from lightning_muws.training.penalty import Penalty

N_STEPS = 4  # times that retraining chooses steps of the file: late ones fit weights that hardly change any more


@dataclass(frozen=True)
class Phases:
    """When the training method starts, updates and ends, and which method it is. The Trainer owns the run's length.

    A time is a whole number of epochs (or steps), or a share of the Trainer's length if it is a float: ``3`` is the
    fourth epoch, ``0.3`` the epoch after three tenths of the run. Before ``admm_start`` the network trains dense. From
    ``admm_end`` on it retrains inside its structure. Equal times mean one projection without ADMM.

    Args:
        interval: What times count: ``epoch`` or ``step`` (batches in which an optimizer stepped).
        admm_start: When ADMM starts.
        admm_end: When the weights are projected and retraining starts.
        update_every: Time between two Z/U updates: a whole number of epochs (or steps), or a share of the ADMM phase if
            it is a float. A share may be shorter than an epoch.
        method: What brings the weights near their structure between ``admm_start`` and ``admm_end``. ``admm``: a
            penalty with a dual, of strength :class:`~lightning_muws.Penalty`. ``soft``: after each step, the weights
            move a small share of the way. ``straight_through``: the network computes with projected weights, and their
            exact values train. ``one_shot``: nothing does; they train dense until they are projected. Several of the
            first three with ``+`` between them, such as ``soft+admm``, follow each other in equal times. ``auto``:
            ``straight_through`` where retraining rounds for a compression, no :class:`~lightning_muws.Penalty` is set
            and no optimizer keeps other values of its weights; else ``admm``.
        round_start: From when on retraining sees the values that the file will hold. This needs a compression to choose
            them for, and a structure: before ``admm_end`` it means ``admm_end``. A share has no effect in a run without
            end. 1.0 for never: the values are then rounded after training.

    Raises:
        SettingError: A value has a wrong type or is not allowed.

    Example:
        >>> Phases(admm_start=0.2, admm_end=0.6, update_every=0.25).on(20)
        Timeline(start=4, end=12, every=2.0, round_start=14.0, round_every=1.5)
    """

    interval: Literal["epoch", "step"] = "epoch"
    admm_start: int | float = 0.2
    admm_end: int | float = 0.5
    update_every: int | float = 0.04
    method: str = AUTO
    round_start: int | float = 0.7

    def __post_init__(self) -> None:
        check_choice("interval", self.interval, ("epoch", "step"))
        if not is_method(self.method):
            words = ", ".join(map(repr, METHODS))
            allowed = f"give {AUTO!r}, {words} or {ONE_SHOT!r}, or several of {words} with + between them"
            raise refuse("method", self.method, allowed)
        for name in ("admm_start", "admm_end", "update_every", "round_start"):
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
        """Return the phases as counts of epochs (or steps).

        Args:
            length: The length of the run in epochs (or steps); None for a run without end.
            clip: Move times after the end of the run to its end, instead of refusing them.

        Raises:
            SettingError: The phases are longer than the run, or a time is a share of a run without end, or no update
                fits between ``admm_start`` and ``admm_end``.
        """
        start, end = self._count("admm_start", length), self._count("admm_end", length)
        if end == start and self.admm_end != self.admm_start:  # in a short run, ADMM still gets one epoch
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
        if not self.has_method:
            start = end
        every: int | float = self.update_every
        if isinstance(every, int) and end > start and every > end - start and not clip:
            raise SettingError(
                f"update_every={every} is longer than the {self.interval}s from {start} to {end} between admm_start "
                "and admm_end, so no update would happen: lower update_every, or give a share such as 0.25"
            )
        if isinstance(every, float):
            every = every * (end - start) or 1.0
        return Timeline(start, end, max(1, round(every)) if self.interval == "step" else every, *self.rounds(length))

    def rounds(self, length: int | None) -> tuple[float, float]:
        """Return when retraining begins to round, and the time after which it chooses other steps.

        Args:
            length: The length of the run in epochs (or steps); None for a run without end.

        Returns:
            Counts of epochs (or steps); infinite where the run never rounds, or never chooses steps again.
        """
        whole = isinstance(self.round_start, int)
        if length is None:
            return (float(self.round_start) if whole else math.inf), math.inf
        start = self.round_start if whole else self.round_start * length
        return (float(start), (length - start) / N_STEPS) if start < length else (math.inf, math.inf)

    @property
    def has_method(self) -> bool:
        """Whether a method runs between ``admm_start`` and ``admm_end``; ``one_shot`` is none."""
        return self.method != ONE_SHOT

    def check_penalty(self, penalty: Penalty) -> None:
        """Check that a penalty has an effect with the method.

        Raises:
            SettingError: A setting of it is not the default one, and the method does not use that.
        """
        unused = ignored(self.method)
        found = [f.name for f in fields(Penalty) if f.name in unused and getattr(penalty, f.name) != f.default]
        if found:
            given = f"penalty.{found[0]}={getattr(penalty, found[0])!r}"
            raise SettingError(
                f"{given} has no effect with method={self.method!r}: leave it out, or take method='admm'"
            )

    def _count(self, name: str, length: int | None) -> int:
        value: int | float = getattr(self, name)
        if isinstance(value, int):
            return value
        if length is None:
            raise SettingError(
                f"{name}={value} is a share of the run's length, and this run has no end: "
                f"give {name} as a whole number of {self.interval}s, or give the Trainer a length"
            )
        return round(value * length)


def is_method(value: object) -> bool:
    """Return whether ``Phases.method`` may have this value."""
    return isinstance(value, str) and (value in (AUTO, ONE_SHOT) or all(part in METHODS for part in value.split("+")))


@dataclass(frozen=True)
class Timeline:
    """The phases as counts of epochs (or steps).

    Args:
        start: When the method starts: it runs while ``start <= now < end``.
        end: When retraining starts.
        every: Time between two updates of the method.
        round_start: When retraining begins to round.
        round_every: Time between two choices of steps.
    """

    start: int
    end: int
    every: int | float
    round_start: float = math.inf
    round_every: float = math.inf

    def share(self, now: float) -> float:
        """Return which part of the method's time is over; 0 to 1 while it runs."""
        return (now - self.start) / max(self.end - self.start, 1)

    def due(self, now: float, last: float) -> int:
        """Return how many updates became due after ``last`` and until ``now``; several where batches are rarer.

        Args:
            now: The epoch (or step) that begins; within an epoch with its fraction.
            last: The time of the last call that found something due.
        """
        return _passed(last, now, self.start, self.every) if self.start < now < self.end else 0

    def rounds_due(self, now: float, last: float) -> bool:
        """Return whether steps are to be chosen, after ``last`` and until ``now``; see :meth:`due`."""
        start, every = self.round_start, self.round_every
        if now < start - 1e-9:
            return False
        return last < start - 1e-9 or _passed(last, now, start, every) > 0


def _passed(last: float, now: float, start: float, every: float) -> int:
    """Return how many multiples of ``every`` after ``start`` lie after ``last`` and until ``now``."""
    # 1e-9 for rounding: with six batches, the fourth begins at half an epoch
    counts = [math.floor((time - start) / every + 1e-9) for time in (last, now)]
    return counts[1] - counts[0]


@dataclass(frozen=True)
class Retraining:
    """How the network trains inside its structure.

    Args:
        unified: ``tied``: the one magnitude of a unified block trains and its signs stay. ``frozen``: both stay.
        schedule: Learning rate schedule of retraining. ``restart``: the module configures fresh optimizers and
            schedules for the length of the retraining phase; without schedules nothing changes. ``module``: the
            module's schedules go on. ``constant``, ``cosine``: these replace the module's schedules and start from its
            initial rate.
        lr: Learning rate at the beginning of the retraining phase, for the first parameter group. The rates of other
            groups and of schedules change by the same factor. 0 keeps the module's rate.

    Raises:
        SettingError: A value has a wrong type or is not allowed.
    """

    unified: Literal["tied", "frozen"] = "tied"
    schedule: Literal["restart", "module", "constant", "cosine"] = "restart"
    lr: float = 0.0

    def __post_init__(self) -> None:
        check_choice("unified", self.unified, ("tied", "frozen"))
        check_choice("schedule", self.schedule, ("restart", "module", "constant", "cosine"))
        if not is_number(self.lr) or not 0 <= self.lr < math.inf:
            raise refuse("lr", self.lr, "give a learning rate > 0, or 0 for the module's")
