"""Straight-through training: the network computes with projected weights, whose exact values train on beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_muws.errors import SettingError
from lightning_muws.structure.sharded import like, local, whole
from lightning_muws.training.choosing import Choosing
from lightning_muws.training.constraint import keeps_points
from lightning_muws.training.method import exact_dtype
from lightning_muws.training.penalty import Penalty
from lightning_muws.training.record import on_device
from lightning_muws.training.residuals import Residuals

EVERY_SETTING = frozenset(field.name for field in fields(Penalty))


class StraightThrough(Choosing):
    """The weights are ``project(X)``; what an optimizer's step adds to them goes to ``X``, which is projected again.

    So gradients pass the projection as if it were not there (the straight-through estimator, Bengio, Leonard and
    Courville 2013, arXiv:1308.3432): a pruned block computes as zero, and still trains. Between two updates the choice
    of blocks and of signs stays. Of each weight one tensor is kept, ``X - project(X)``, in float32 (float64 for float64
    weights), which is 0 on dense blocks. The penalty has no effect.

    Args:
        entries: The structure of each weight, by name: a plan's ``covered``.
        penalty: Not used.

    Example:
        >>> from lightning_muws import MicroStructure, Penalty
        >>> from lightning_muws.structure.plan import make_plan
        >>> layer = torch.nn.Linear(8, 8)
        >>> method = StraightThrough(make_plan(layer, MicroStructure(prune_ratio=0.5)).covered, Penalty())
        >>> before = layer.weight.detach().clone()
        >>> method.start({"weight": layer.weight})
        >>> int((layer.weight == 0).sum())
        32
        >>> method.finish({"weight": layer.weight})
        >>> bool((layer.weight == before).all())
        True
    """

    ignored = EVERY_SETTING

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self.rho = 0.0  # nothing pulls
        self._left: dict[str, Tensor] = {}

    def start(self, weights: Mapping[str, Tensor]) -> None:
        """Choose the blocks of these weights, and project them in place; see :class:`Method`."""
        super().start(weights)
        for name, weight in weights.items():
            self._show(name, weight, _copy(weight))

    @torch.no_grad()
    def _show(self, name: str, weight: Tensor, x: Tensor) -> None:
        """Write ``project(x)`` into a weight, and keep what is left of ``x``, in its memory."""
        shown = weight.detach()
        if weight.dtype == x.dtype:  # in place: no other copy
            local(shown).copy_(local(x))
            self._project_(name, shown)
        else:
            local(shown).copy_(local(self._project_(name, x.clone())))
        local(x).sub_(local(shown))
        self._left[name] = x

    @torch.no_grad()
    def _exact(self, name: str, weight: Tensor) -> Tensor:
        x = _copy(weight)
        local(x).add_(local(self._left[name]))
        return x

    def check(self, optimizers: Iterable[Optimizer]) -> None:
        """Check that no optimizer keeps points beside its weights, which would overwrite the projected ones.

        Raises:
            SettingError: One does.
        """
        found = [type(optimizer).__name__ for optimizer in optimizers if keeps_points(optimizer)]
        if found:
            raise SettingError(
                f"method='straight_through' with {found[0]}, which keeps other values of each weight beside it and "
                "would overwrite the projected ones: take method='admm', or another optimizer"
            )

    @torch.no_grad()
    def after_step(self, weights: Mapping[str, Tensor]) -> None:
        """Move what an optimizer's step added to these weights to their exact values, and project again, in place."""
        for name, weight in weights.items():
            x = self._left[name]
            local(x).add_(local(weight.detach()))
            self._show(name, weight, x)

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], due: int = 1) -> dict[str, Residuals]:
        """Choose the blocks anew, from the exact values; see :class:`Method`."""
        found = {}
        for name, weight in weights.items():
            x = self._exact(name, weight)
            found[name] = self._choose_again(name, x)
            self._show(name, weight, x)
        return found

    @torch.no_grad()
    def finish(self, weights: Mapping[str, Tensor]) -> None:
        """Write the exact values back into the weights."""
        for name, weight in weights.items():
            local(weight.detach()).copy_(local(self._exact(name, weight)))
        self._left = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the choice of blocks, and what the projection took from each weight."""
        return {**super().state_dict(), "left": {name: whole(x) for name, x in self._left.items()}}

    def load_state_dict(self, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Load what :meth:`state_dict` returned, onto the devices of these weights."""
        super().load_state_dict(state, weights)
        for name, saved in state["left"].items():
            weight = weights[name]
            self._left[name] = like(on_device({"left": saved}, weight, exact_dtype(weight))["left"], weight)


def _copy(weight: Tensor) -> Tensor:
    return weight.detach().to(exact_dtype(weight), copy=True)
