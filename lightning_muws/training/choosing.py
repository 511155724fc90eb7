"""What soft shrinkage and straight-through training share: the choice of blocks that is chosen anew at each update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_muws.structure.plan import PlanEntry
from lightning_muws.structure.sharded import apply_, choice_state, load_choice, norm, part, whole
from lightning_muws.structure.structure import Choice
from lightning_muws.structure.support import Support
from lightning_muws.training.method import Method, exact_dtype
from lightning_muws.training.penalty import Penalty
from lightning_muws.training.record import on_device
from lightning_muws.training.residuals import Residuals


class Choosing(Method):
    """A method that keeps the choice of blocks and signs of each weight, and chooses anew at each update.

    Between two updates the projection is therefore linear: see :class:`Support`.

    Args:
        entries: The structure of each weight, by name: a plan's ``covered``.
        penalty: How hard the method pulls.
    """

    def __init__(self, entries: Mapping[str, PlanEntry], penalty: Penalty) -> None:
        self.entries, self.settings, self.rho = dict(entries), penalty, penalty.rho
        self._weights: dict[str, Tensor] = {}
        self._choices: dict[str, Choice] = {}

    @torch.no_grad()
    def start(self, weights: Mapping[str, Tensor]) -> None:
        """Choose the blocks of these weights; see :class:`Method`."""
        self._weights = dict(weights)
        for name, weight in weights.items():
            self._choose(name, weight.detach())

    def _choose(self, name: str, x: Tensor) -> None:
        """Choose the blocks of the nearest point to ``x``; gathers all of it where it is sharded."""
        entry = self.entries[name]
        self._choices[name] = part(x, *entry.structure.nearest(whole(x), entry.grid, name))

    def _project_(self, name: str, x: Tensor) -> Tensor:
        """Project in place, with the blocks and signs of the last choice; return the same tensor."""
        apply_(x, self._choices[name].support, Support.project_)
        return x

    def _choose_again(self, name: str, x: Tensor) -> Residuals:
        """Choose anew; return how far ``x`` is from its projection, and how far the new choice moved that."""
        before, size = self._project_(name, x.clone()), max(norm(x), torch.finfo(x.dtype).tiny)
        self._choose(name, x)
        after = self._project_(name, x.clone())
        dual = norm(after - before) / size
        return Residuals(norm(x - after) / size, dual)

    def choices(self) -> dict[str, tuple[Support, Tensor]]:
        """Return this rank's choice of blocks, and the magnitudes when it was made, by name."""
        return {name: (choice.support, choice.magnitudes) for name, choice in self._choices.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return rho and the choice of blocks of each weight, as plain dicts, floats and tensors."""
        weights = {name: choice_state(self._weights[name], *choice) for name, choice in self._choices.items()}
        return {"rho": self.rho, "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Load what :meth:`state_dict` returned, onto the devices of these weights."""
        self.rho, self._weights = state["rho"], dict(weights)
        for name, saved in state["weights"].items():
            weight = weights[name]
            self._choices[name] = load_choice(
                weight, on_device(saved, weight, exact_dtype(weight)), self.entries[name].grid
            )
