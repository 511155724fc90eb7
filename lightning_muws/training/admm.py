"""Scaled ADMM of named weights, ``min f(W) + g(Z) s.t. W = Z`` (Boyd et al. 2011, section 3.1.1). Plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_muws.errors import StateError
from lightning_muws.structure.grid import CHUNK_NUMEL
from lightning_muws.structure.plan import PlanEntry
from lightning_muws.structure.sharded import (
    apply_,
    choice_state,
    is_sharded,
    like,
    load_choice,
    local,
    norm,
    part,
    whole,
)
from lightning_muws.structure.support import Support
from lightning_muws.training.penalty import Penalty


@dataclass(frozen=True)
class Residuals:
    """How far from done, of one weight or over all: both fall towards 0 and neither has a unit.

    Args:
        primal: ``|W - Z| / |W|``, how far the weights are from their structure.
        dual: ``|Z - Z_old| / |W|``, how far the structured copy moved in the update.
    """

    primal: float
    dual: float


@dataclass
class _Split:
    """The state of one weight: V = Z - U is all that the penalty needs, and Z and U come back from it.

    On a dense block U = 0 and Z = V, on a pruned one Z = 0, on a unified one Z = sign * magnitude.
    """

    v: Tensor
    magnitudes: Tensor
    packed: dict[str, Tensor]  # the support of Z; as the magnitudes, this rank's part


class _Scratch:
    """Memory for copies of one weight after the other: fresh memory costs ten times what writing to it does."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._sizes: dict[torch.dtype, int] = {}
        for x in tensors:
            self._sizes[x.dtype] = max(self._sizes.get(x.dtype, 0), x.numel())
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}

    def copy(self, x: Tensor, role: int) -> Tensor:
        """Return a copy that lasts until the next one in the same role."""
        if is_sharded(x) or x.device.type != "cpu":  # whose memory is pooled
            return x.clone()
        key = role, x.dtype
        if key not in self._buffers:
            self._buffers[key] = torch.empty(self._sizes[x.dtype], dtype=x.dtype)
        return self._buffers[key][: x.numel()].view(x.shape).copy_(x)


class Admm:
    """The split W/Z/U of a set of named weights, with one penalty factor rho for all.

    The caller owns the loop: :meth:`start` once, :meth:`add_penalty_gradient` before each optimizer step,
    :meth:`update` now and then. It keeps one dense tensor a weight, V = Z - U, in float32 (float64 for float64
    weights), and a few bits a block. Of a sharded weight (DTensor) each rank keeps its part; one at a time is gathered.

    Args:
        entries: What each weight becomes, by name: a plan's ``covered``.
        penalty: The penalty factor rho, and how it grows.

    Example:
        >>> from lightning_muws.structure.plan import MicroStructure, make_plan
        >>> layer = torch.nn.Linear(8, 8)
        >>> plan = make_plan(layer, MicroStructure(prune_ratio=0.5))
        >>> admm = Admm(plan.covered, Penalty(rho=0.1))
        >>> admm.start({"weight": layer.weight})
    """

    def __init__(self, entries: Mapping[str, PlanEntry], penalty: Penalty) -> None:
        self.entries, self.settings, self.rho = dict(entries), penalty, penalty.rho
        self._splits: dict[str, _Split] = {}

    @torch.no_grad()
    def start(self, weights: Mapping[str, Tensor]) -> None:
        """Split each weight where it stands: Z its projection, U zero.

        Raises:
            StateError: A weight has NaN or Inf.
        """
        for name in self.entries:
            v = weights[name].detach().to(_exact(weights[name]), copy=True)
            support, magnitudes = self._choose(name, v)
            apply_(v, support, Support.place_, magnitudes)
            self._splits[name] = _Split(v, magnitudes, support.state_dict())

    @torch.no_grad()
    def add_penalty_gradient(self, weights: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Add ``scale * rho * (W - Z + U)`` to the gradient of each of these weights, which gets one if it has none.

        W - V is taken first: added one after the other, rho * W and -rho * V would cancel in half precision.
        """
        for name, weight in weights.items():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            parts = [(local(weight.grad), local(weight.detach()), local(self._splits[name].v))]
            if weight.device.type == "cpu" and all(x.is_contiguous() for x in parts[0]):
                # temporaries stay in the cache
                parts = list(zip(*(torch.split(x.view(-1), CHUNK_NUMEL) for x in parts[0]), strict=True))
            for g, w, v in parts:
                if g.dtype == v.dtype:
                    g.add_(w - v, alpha=self.rho * scale)
                else:  # half precision: one rounding
                    g.copy_(g.to(v.dtype).add_(w.to(v.dtype) - v, alpha=self.rho * scale))

    @torch.no_grad()
    def penalty(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return ``sum rho / 2 * |W - Z + U|^2`` over these weights, a scalar."""
        squares = [whole((w.detach() - self._splits[name].v).square().sum()) for name, w in weights.items()]
        return self.rho / 2 * torch.stack(squares).sum()

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], due: int = 1) -> dict[str, Residuals]:
        """Set ``Z = project(W + U)``, ``U += W - Z``, then let rho grow, which keeps the unscaled dual rho * U.

        Args:
            weights: The weights, by name.
            due: How many updates this one stands for: rho grows as often.

        Returns:
            The residuals of each weight.

        Raises:
            StateError: A weight has NaN or Inf; nothing is changed then for it and those after it.
        """
        rho = self.settings.grown(self.rho, due)
        scratch = _Scratch(split.v for split in self._splits.values())
        residuals = {n: self._update(n, weights[n].detach(), self.rho / rho, scratch) for n in self.entries}
        self.rho = rho
        return residuals

    def _update(self, name: str, weight: Tensor, shrink: float, scratch: _Scratch) -> Residuals:
        """Update one weight's split; U is multiplied by ``shrink``, as rho is divided by it."""
        v = self._splits[name].v
        z_old, total = self._place(name, scratch.copy(v, 0)), scratch.copy(v, 1)
        local(total).sub_(local(z_old)).neg_().add_(local(weight))
        support, magnitudes = self._choose(name, total)
        z = v  # whose memory is free now
        local(z).copy_(local(total))
        apply_(z, support, Support.place_, magnitudes)
        size = max(norm(weight), torch.finfo(z.dtype).tiny)
        local(z_old).sub_(local(z))
        dual = norm(z_old) / size
        local(z_old).copy_(local(z)).sub_(local(weight))
        primal = norm(z_old) / size
        # V = Z - shrink * (total - Z), which on a dense block is the weight, bit for bit
        torch.lerp(local(total), local(z), 1 + shrink, out=local(v))
        self._splits[name] = _Split(v, magnitudes, support.state_dict())
        return Residuals(primal, dual)

    def _choose(self, name: str, total: Tensor) -> tuple[Support, Tensor]:
        """Return what becomes of a weight's blocks, this rank's: all of the weight is gathered for the moment."""
        entry = self.entries[name]
        return part(total, *entry.structure.nearest(whole(total), entry.grid, name))

    def z(self, name: str) -> Tensor:
        """Return a weight's structured copy Z, of its shape, sharded like it."""
        return self._place(name, self._splits[name].v.clone())

    def _place(self, name: str, v: Tensor) -> Tensor:
        support, magnitudes = self._choice(name)
        apply_(v, support, Support.place_, magnitudes)
        return v

    def _choice(self, name: str) -> tuple[Support, Tensor]:
        split = self._splits[name]
        return Support.from_state_dict(split.packed, self.entries[name].grid), split.magnitudes

    def u(self, name: str) -> Tensor:
        """Return a weight's scaled dual U, of its shape, sharded like it."""
        return self.z(name) - self._splits[name].v

    def choices(self) -> dict[str, tuple[Support, Tensor]]:
        """Return this rank's support of each Z, and its magnitudes, by name."""
        return {name: self._choice(name) for name in self._splits}

    def state_dict(self) -> dict[str, Any]:
        """Return rho and each weight's tensors, as plain dicts, floats and tensors."""
        weights = {}
        for name, (support, magnitudes) in self.choices().items():
            v = self._splits[name].v
            weights[name] = {"v": whole(v), **choice_state(v, support, magnitudes)}
        return {"rho": self.rho, "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Take up a state, on the devices of these weights.

        Raises:
            StateError: The state is of other weights.
        """
        for name, tensors in on_device(state["weights"], weights, self.entries).items():
            support, magnitudes = load_choice(weights[name], tensors, self.entries[name].grid)
            self._splits[name] = _Split(like(tensors["v"], weights[name]), magnitudes, support.state_dict())
        self.rho = state["rho"]


def total(residuals: Mapping[str, Residuals], weights: Mapping[str, Tensor]) -> Residuals:
    """Return the residuals over all weights together, from each one's, by name."""
    squares = {name: norm(weights[name].detach()) ** 2 for name in residuals}
    size = max(sum(squares.values()), torch.finfo(torch.float32).tiny)
    primal = sum(squares[name] * r.primal**2 for name, r in residuals.items())
    dual = sum(squares[name] * r.dual**2 for name, r in residuals.items())
    return Residuals(math.sqrt(primal / size), math.sqrt(dual / size))


def on_device(
    state: Mapping[str, Mapping[str, Tensor]], weights: Mapping[str, Tensor], entries: Mapping[str, PlanEntry]
) -> dict[str, dict[str, Tensor]]:
    """Return a copy of each weight's saved tensors on that weight's device.

    Raises:
        StateError: Names or shapes are not those of the plan.
    """
    wrong = sorted(set(state) ^ set(entries)) or [
        name
        for name, saved in state.items()
        if tuple(saved["kinds"].shape) != entries[name].grid.counts(entries[name].shape)
    ]
    if wrong:
        raise StateError(
            f"the state does not fit the plan at {', '.join(wrong[:5])}: resume with the rules it was saved with"
        )
    return {name: {k: x.to(weights[name].device, copy=True) for k, x in saved.items()} for name, saved in state.items()}


def _exact(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
