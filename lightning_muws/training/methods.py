"""The table of training methods, by the name that `Phases.method` gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lightning_muws.structure.plan import PlanEntry
from lightning_muws.training.admm import Admm
from lightning_muws.training.method import Method
from lightning_muws.training.penalty import Penalty

Factory = Callable[[Mapping[str, PlanEntry], Penalty], Method]

METHODS: dict[str, Factory] = {"admm": Admm}
"""Each row makes a method from a plan's ``covered`` entries and the penalty settings."""
