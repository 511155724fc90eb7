"""Soft shrinkage: after each optimizer step, weights move a small share of the way to their structure. No dual."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_muws.structure.sharded import local
from lightning_muws.training.choosing import Choosing
from lightning_muws.training.residuals import Residuals

SHARE = 1e-3  # of the distance that one step takes away at rho=1


class SoftShrinkage(Choosing):
    """Iterative soft shrinkage: after each step, ``W = W + share * (project(W) - W)``, with ``share = rho / 1000``.

    Pruned blocks shrink and unified ones draw together, while dense ones keep every bit. Between two updates the choice
    of blocks and of signs stays, so the projection is linear. An update chooses anew, from weights that may have grown
    back. This is the idea of soft shrinkage of single weights (Wang et al. 2023, arXiv:2303.09650), for blocks of three
    kinds and with the share of :class:`Penalty`. No tensor is kept beside a weight, but a few bits a block.

    Args:
        entries: The structure of each weight, by name: a plan's ``covered``.
        penalty: ``rho`` is the share in thousandths, at most 1000; ``rho_growth`` and ``rho_max`` are as in ADMM.

    Example:
        >>> from lightning_muws import MicroStructure, Penalty
        >>> from lightning_muws.structure.plan import make_plan
        >>> layer = torch.nn.Linear(8, 8)
        >>> plan = make_plan(layer, MicroStructure(prune_ratio=0.5))
        >>> soft = SoftShrinkage(plan.covered, Penalty(rho=500, rho_max=1000))
        >>> soft.start({"weight": layer.weight})
        >>> before = layer.weight.detach().clone()
        >>> soft.after_step({"weight": layer.weight})
        >>> int((layer.weight == before / 2).sum()), int((layer.weight == before).sum())
        (32, 32)
    """

    ignored = frozenset({"relative", "balance"})

    @torch.no_grad()
    def after_step(self, weights: Mapping[str, Tensor]) -> None:
        """Move these weights towards their structure, in place."""
        share = min(1.0, self.rho * SHARE)
        for name, weight in weights.items():
            projected = self._project_(name, weight.detach().clone())
            local(weight.detach()).lerp_(local(projected), share)

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], due: int = 1) -> dict[str, Residuals]:
        """Choose the blocks anew, and change rho; see :class:`Method`."""
        found = {name: self._choose_again(name, weight.detach()) for name, weight in weights.items()}
        self.rho = self.settings.grown(self.rho, due)
        return found
