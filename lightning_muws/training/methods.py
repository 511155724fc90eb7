"""The table of training methods, by the name that `Phases.method` gives."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from lightning_muws.structure.plan import PlanEntry
from lightning_muws.training.admm import Admm
from lightning_muws.training.method import Method
from lightning_muws.training.penalty import Penalty
from lightning_muws.training.sequence import Factory, MethodSequence
from lightning_muws.training.soft import SoftShrinkage
from lightning_muws.training.straight_through import EVERY_SETTING, StraightThrough

METHODS: dict[str, Factory] = {"admm": Admm, "soft": SoftShrinkage, "straight_through": StraightThrough}
"""Each row makes a method from a plan's ``covered`` entries and the penalty settings."""

ONE_SHOT = "one_shot"
"""The name of no method: dense training goes on until the weights are projected."""


def ignored(name: str) -> frozenset[str]:
    """Return the settings of a penalty that a method does not use; see :func:`make_method`."""
    if name == ONE_SHOT:
        return EVERY_SETTING
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
