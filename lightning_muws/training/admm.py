"""ADMM of named weights in scaled form, ``min f(W) + g(Z) s.t. W = Z`` (Boyd et al. 2011, section 3.1.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

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
from lightning_muws.training.method import Method, exact_dtype
from lightning_muws.training.penalty import Penalty
from lightning_muws.training.record import on_device
from lightning_muws.training.residuals import Residuals, total


class Admm(Method):
    """ADMM: the weights W follow a structured copy Z, and the scaled dual U adds up what is left between them.

    ``f`` is the loss of the network and ``g`` is 0 on the structure and infinite elsewhere. One round is::

        W = argmin f(W) + rho / 2 * |W - Z + U|^2    some optimizer steps, with rho * (W - Z + U) added to the gradient
        Z = project(W + U)                           the nearest point of the structure
        U = U + W - Z

    The W-step needs only ``V = Z - U``. So V is the one dense tensor kept for a weight, in float32 (float64 for float64
    weights), beside a few bits a block. Z and U follow from V and the choice of blocks: Z is V on a dense block, 0 on a
    pruned one, and sign times magnitude on a unified one; U is Z - V. Of a sharded weight (DTensor) each rank keeps its
    part of V; an update gathers one weight at a time.

    Where rho grows, U shrinks by the same factor, which keeps the unscaled dual ``rho * U`` (section 3.4.1). Each
    weight has its own rho, as :class:`Penalty` describes; ``rho`` is their mean, before a division by ``|W|^2``.

    Args:
        entries: The structure of each weight, by name: a plan's ``covered``.
        penalty: The penalty factor rho, and how it changes.

    Example:
        >>> from lightning_muws.structure.plan import MicroStructure, make_plan
        >>> layer = torch.nn.Linear(8, 8)
        >>> plan = make_plan(layer, MicroStructure(prune_ratio=0.5))
        >>> admm = Admm(plan.covered, Penalty(rho=0.1))
        >>> admm.start({"weight": layer.weight})
        >>> int((admm.z("weight") == 0).sum()), float(admm.u("weight").abs().sum())
        (32, 0.0)
    """

    def __init__(self, entries: Mapping[str, PlanEntry], penalty: Penalty) -> None:
        self.entries, self.settings = dict(entries), penalty
        self._rhos = dict.fromkeys(entries, penalty.rho)
        self._scales = dict.fromkeys(entries, 1.0)
        self._splits: dict[str, _Split] = {}

    @property
    def rho(self) -> float:  # type: ignore[override]
        """The mean of the penalty factors of all weights."""
        found = set(self._rhos.values()) or {self.settings.rho}
        return found.pop() if len(found) == 1 else fmean(self._rhos.values())  # the mean of equal ones may round

    @torch.no_grad()
    def start(self, weights: Mapping[str, Tensor]) -> None:
        """Set ``Z = project(W)`` and ``U = 0``.

        Args:
            weights: The weights, by name; any floating dtype.

        Raises:
            StateError: A weight has NaN or Inf.
        """
        for name in self.entries:
            v = weights[name].detach().to(exact_dtype(weights[name]), copy=True)
            size = norm(v) if self.settings.relative else 1.0
            self._scales[name] = size**-2 if size else 1.0
            self._splits[name] = self._project_(name, v)

    @torch.no_grad()
    def before_step(self, weights: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Add ``scale * rho * (W - Z + U)``, the penalty's gradient, to the gradient of each of these weights.

        A weight without a gradient gets one. The difference W - V is taken first: added one after the other, rho * W
        and -rho * V would cancel in half precision.

        Args:
            weights: Some of the weights, by name.
            scale: Factor on what is added; negative where the optimizer maximizes.
        """
        for name, weight in weights.items():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            pull = self._rhos[name] * self._scales[name] * scale
            parts = [(local(weight.grad), local(weight.detach()), local(self._splits[name].v))]
            if weight.device.type == "cpu" and all(x.is_contiguous() for x in parts[0]):
                # temporaries stay in the cache
                parts = list(zip(*(torch.split(x.view(-1), CHUNK_NUMEL) for x in parts[0]), strict=True))
            for g, w, v in parts:
                if g.dtype == v.dtype:
                    g.add_(w - v, alpha=pull)
                else:  # half precision: one rounding
                    g.copy_(g.to(v.dtype).add_(w.to(v.dtype) - v, alpha=pull))

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], due: int = 1) -> dict[str, Residuals]:
        """Set ``Z = project(W + U)`` and ``U = U + W - Z``, then change rho.

        Args:
            weights: The weights, by name.
            due: For how many updates this one stands: rho changes as often.

        Returns:
            The residuals of each weight.

        Raises:
            StateError: A weight has NaN or Inf; the update changes nothing for it and those after it.
        """
        grown = {name: self.settings.grown(rho, due) for name, rho in self._rhos.items()}
        rhos = grown if self.settings.balance == "none" else self._rhos
        scratch = _Scratch(split.v for split in self._splits.values())
        residuals = {n: self._update(n, weights[n].detach(), self._rhos[n] / rhos[n], scratch) for n in self.entries}
        self._rhos = rhos
        if self.settings.balance != "none":
            self._balance(residuals, weights, due)
        return residuals

    def _balance(self, residuals: Mapping[str, Residuals], weights: Mapping[str, Tensor], due: int) -> None:
        """Change each rho by what the residuals call for, and U with it."""
        overall = total(residuals, weights)
        factor = self.settings.balanced(self.rho, overall.primal, overall.dual, due) / self.rho
        for name, found in residuals.items():
            old, rho = self._rhos[name], self._rhos[name] * factor
            if self.settings.balance == "weight":
                rho = self.settings.balanced(old, found.primal, found.dual, due)
            if rho != old:
                z, v = self.z(name), self._splits[name].v
                v.copy_(z.sub_(z - v, alpha=old / rho))  # V = Z - U * old / rho
                self._rhos[name] = rho

    def _update(self, name: str, weight: Tensor, shrink: float, scratch: _Scratch) -> Residuals:
        """Update the V of one weight in place, where U is multiplied by ``shrink`` as rho is divided by it.

        Each line computes what its comment says, in one of three memories: V's own, in which Z is built, and two
        buffers. W + U stays in its buffer until U is taken from it, so that U is exactly 0 on a dense block.
        """
        z = self._splits[name].v
        z_old, w_plus_u = self._place_(name, scratch.copy(z, 0)), scratch.copy(z, 1)
        w, v, old, total = (local(x) for x in (weight, z, z_old, w_plus_u))

        torch.sub(old, v, out=total).add_(w)  # W + U, where U = Z_old - V
        choice = self._choose(name, w_plus_u)
        v.copy_(total)
        self._splits[name] = self._project_(name, z, choice)  # Z = project(W + U)

        size = max(norm(weight), torch.finfo(z.dtype).tiny)
        old.sub_(v)
        dual = norm(z_old) / size  # |Z_old - Z| / |W|
        torch.sub(w, v, out=old)
        primal = norm(z_old) / size  # |W - Z| / |W|

        total.sub_(v)  # U = (W + U) - Z
        v.sub_(total, alpha=shrink)  # V = Z - shrink * U
        return Residuals(primal, dual)

    def _choose(self, name: str, x: Tensor) -> tuple[Support, Tensor]:
        """Return this rank's part of the choice that gives the nearest point to ``x``; gathers all of ``x``."""
        entry = self.entries[name]
        return part(x, *entry.structure.nearest(whole(x), entry.grid, name))

    def _project_(self, name: str, x: Tensor, choice: tuple[Support, Tensor] | None = None) -> _Split:
        """Move ``x`` to its nearest point, in place, and return it as V where U is 0."""
        support, magnitudes = choice or self._choose(name, x)
        apply_(x, support, Support.place_, magnitudes)
        return _Split(x, magnitudes, support.state_dict())

    def _place_(self, name: str, v: Tensor) -> Tensor:
        """Turn V into Z, in place: Z is V on dense blocks."""
        support, magnitudes = self._choice(name)
        apply_(v, support, Support.place_, magnitudes)
        return v

    def _choice(self, name: str) -> tuple[Support, Tensor]:
        split = self._splits[name]
        return Support.from_state_dict(split.packed, self.entries[name].grid), split.magnitudes

    @torch.no_grad()
    def penalty(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return ``sum rho / 2 * |W - Z + U|^2`` over these weights, with the rho of each, a scalar."""
        parts = []
        for name, weight in weights.items():
            square = whole((weight.detach() - self._splits[name].v).square().sum())
            parts.append(self._rhos[name] * self._scales[name] / 2 * square)
        return torch.stack(parts or [torch.zeros(())]).sum()  # a budget may keep all weights dense

    def z(self, name: str) -> Tensor:
        """Return the structured copy Z of a weight: the weight's shape, float32 or float64, sharded like it."""
        return self._place_(name, self._splits[name].v.clone())

    def u(self, name: str) -> Tensor:
        """Return the scaled dual U of a weight: the weight's shape, float32 or float64, sharded like it."""
        return self.z(name) - self._splits[name].v

    def choices(self) -> dict[str, tuple[Support, Tensor]]:
        """Return this rank's support of each Z, and its magnitudes, by name."""
        return {name: self._choice(name) for name in self._splits}

    def metrics(self, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        """Return the penalty over these weights."""
        return {"penalty": self.penalty(weights)}

    def state_dict(self) -> dict[str, Any]:
        """Return each rho, and V and the choice of blocks of each weight, as plain dicts, floats and tensors."""
        weights = {}
        for name, (support, magnitudes) in self.choices().items():
            v = self._splits[name].v
            weights[name] = {"v": whole(v), **choice_state(v, support, magnitudes)}
        return {"rho": dict(self._rhos), "scale": dict(self._scales), "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Load what :meth:`state_dict` returned, onto the devices and into the dtypes of these weights."""
        for name, saved in state["weights"].items():
            tensors = on_device(saved, weights[name], exact_dtype(weights[name]))
            support, magnitudes = load_choice(weights[name], tensors, self.entries[name].grid)
            self._splits[name] = _Split(like(tensors["v"], weights[name]), magnitudes, support.state_dict())
        self._rhos = dict(state["rho"])  # above a lower rho_max, the next update lowers it and scales U
        self._scales = dict(state["scale"])


@dataclass
class _Split:
    """The state of one weight: V, and the choice of blocks with which Z and U follow from it."""

    v: Tensor
    magnitudes: Tensor  # (n_unified,), as the support this rank's part
    packed: dict[str, Tensor]  # the support of Z, signs eight to a byte


class _Scratch:
    """Memory for copies of one weight after the other: on a CPU, fresh memory costs ten times a write to it."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._sizes: dict[torch.dtype, int] = {}
        for x in tensors:
            self._sizes[x.dtype] = max(self._sizes.get(x.dtype, 0), x.numel())
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}

    def copy(self, x: Tensor, role: int) -> Tensor:
        """Return a copy that lasts until the next one in the same role."""
        if is_sharded(x) or x.device.type != "cpu":  # an accelerator's allocator pools its memory
            return x.clone()
        key = role, x.dtype
        if key not in self._buffers:
            self._buffers[key] = torch.empty(self._sizes[x.dtype], dtype=x.dtype)
        return self._buffers[key][: x.numel()].view(x.shape).copy_(x)
