"""The table of training methods, by the name that `Phases.method` gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from torch.optim import Optimizer

from lightning_muws.structure.plan import PlanEntry
from lightning_muws.training.admm import Admm
from lightning_muws.training.constraint import keeps_points
from lightning_muws.training.method import Method
from lightning_muws.training.penalty import Penalty
from lightning_muws.training.sequence import Factory, MethodSequence
from lightning_muws.training.soft import SoftShrinkage
from lightning_muws.training.straight_through import EVERY_SETTING, StraightThrough

METHODS: dict[str, Factory] = {"admm": Admm, "soft": SoftShrinkage, "straight_through": StraightThrough}
"""Each row makes a method from a plan's ``covered`` entries and the penalty settings."""

ONE_SHOT = "one_shot"
"""The name of no method: dense training goes on until the weights are projected."""

AUTO = "auto"
"""The name of no method: the run chooses one; see :func:`choose_method`."""


def choose_method(name: str, *, rounds: bool, penalty: Penalty, optimizers: Iterable[Optimizer]) -> str:
    """Return the method that ``auto`` stands for; any other name as it is.

    Straight-through training lost less than ADMM where retraining rounds (``make bench-methods``). It works with no
    optimizer that keeps points, and uses no penalty.

    Args:
        name: A name of ``Phases.method``.
        rounds: Whether retraining will round.
        penalty: How hard the method pulls; one that is not the default asks for ADMM.
        optimizers: Those of the run.
    """
    if name != AUTO:
        return name
    fits = rounds and penalty == Penalty() and not any(keeps_points(optimizer) for optimizer in optimizers)
    return "straight_through" if fits else "admm"


def ignored(name: str) -> frozenset[str]:
    """Return the settings of a penalty that a method does not use; see :func:`make_method`."""
    if name == ONE_SHOT:
        return EVERY_SETTING
    if name == AUTO:
        return frozenset()
    return frozenset.intersection(*(getattr(METHODS[part], "ignored", frozenset()) for part in name.split("+")))


def make_method(name: str, entries: Mapping[str, PlanEntry], penalty: Penalty) -> Method:
    """Return a new method.

    Args:
        name: A name of :data:`METHODS`, or several with ``+`` between them: these follow each other in equal times.
        entries: The structure of each weight, by name: a plan's ``covered``.
        penalty: How hard it pulls.
    """
    factories = [METHODS[part] for part in name.split("+")]
    make = factories[0] if len(factories) == 1 else partial(MethodSequence, factories)
    return make(entries, penalty)
