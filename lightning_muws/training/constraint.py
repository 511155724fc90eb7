"""Retraining inside the structure: any optimizer's steps end inside it, to the bit. Plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_muws.errors import StateError
from lightning_muws.structure.plan import PlanEntry
from lightning_muws.structure.sharded import apply_, choice_state, largest, load_choice, local, norm, part, whole
from lightning_muws.structure.support import Support
from lightning_muws.training.record import on_device

# What an optimizer remembers of a weight is recognised by its name, so that all ranks and resumed runs agree.
# These states are no sums of gradients but of their squares, or sizes: they have no sign.
UNSIGNED = {"sum", "exp_inf", "acc_delta", "step_size"}
# These are points, other values of the weight itself: the iterates of schedule-free optimizers (x, y, z), the averages
# of ASGD (ax) and SWA, and the slow weights of Lookahead.
POINTS = {"x", "y", "z", "ax", "swa_buffer", "slow_buffer", "lookahead_slow_buff"}


class Constraint:
    """Holds named weights inside the subspaces that are left once their structure is chosen.

    Call :meth:`project_moments` once at the start, or old momentum leads out of the subspace. Call
    :meth:`project_gradients` before each step, so that clipping and moments see free directions only. Call
    :meth:`enforce` after it. All projections are orthogonal, so a projected gradient is the gradient of the loss inside
    the subspace.

    Args:
        supports: The support of each weight, by name; of a sharded weight this rank's part.
        magnitudes: The magnitudes of the unified blocks of each weight, ``(n_unified,)`` in the weight's dtype. Frozen
            blocks keep them.
        unified: ``tied``: the magnitude of a unified block trains; ``frozen``: it does not.

    Example:
        >>> from lightning_muws.structure.plan import MicroStructure, make_plan
        >>> layer = torch.nn.Linear(8, 8)
        >>> plan = make_plan(layer, MicroStructure(prune_ratio=0.5))
        >>> constraint = Constraint.freeze(plan.weights(layer), plan.covered)
        >>> layer.weight.data += 1.0
        >>> constraint.enforce(plan.weights(layer))
        >>> int((layer.weight == 0).sum())
        32
    """

    def __init__(
        self,
        supports: Mapping[str, Support],
        magnitudes: Mapping[str, Tensor],
        unified: Literal["tied", "frozen"] = "tied",
    ) -> None:
        self.supports, self.magnitudes, self.unified = dict(supports), dict(magnitudes), unified
        self.primal: dict[str, float] = {}  # |W - project(W)| / |W| of each weight when it was chosen
        self._directions = {name: s if unified == "tied" else s.fixed for name, s in self.supports.items()}

    @classmethod
    @torch.no_grad()
    def freeze(
        cls,
        weights: Mapping[str, Tensor],
        entries: Mapping[str, PlanEntry],
        unified: Literal["tied", "frozen"] = "tied",
    ) -> Constraint:
        """Choose each weight's support, move the weight to its nearest point in place, and return the constraint.

        Args:
            weights: The weights, by name; any floating dtype.
            entries: The structure of each weight, by name: a plan's ``covered``.
            unified: ``tied`` or ``frozen``.

        Raises:
            StateError: A weight has NaN or Inf; no weight is changed then.
        """
        chosen = {
            n: part(weights[n], *e.structure.nearest(whole(weights[n].detach()), e.grid, n)) for n, e in entries.items()
        }
        constraint = cls({n: s for n, (s, _) in chosen.items()}, {n: m for n, (_, m) in chosen.items()}, unified)
        for name, (support, magnitudes) in chosen.items():
            weight = weights[name].detach()
            moved, size = weight.clone(), max(norm(weight), torch.finfo(weight.dtype).tiny)
            apply_(weight, support.copy(), Support.place_, magnitudes)
            local(moved).sub_(local(weight))
            constraint.primal[name] = norm(moved) / size
        return constraint

    def project_gradients(self, weights: Mapping[str, Tensor]) -> None:
        """Project the gradients of these weights onto the directions that the weights may move in, in place."""
        for name, weight in weights.items():
            if weight.grad is not None:
                apply_(weight.grad, self._directions[name], Support.project_)

    def project_moments(self, weights: Mapping[str, Tensor], optimizer: Optimizer) -> None:
        """Project what an optimizer remembers of these weights: points, moments of gradients, or squared moments.

        A point, recognised by its name in :data:`POINTS`, is moved onto the support like a weight, with the frozen
        magnitudes where they are frozen. A moment is projected onto the directions that the weight may move in.
        """
        for name, weight in weights.items():
            directions = self._directions[name]
            for key, memory in _memories(weight, optimizer):
                if key in POINTS and self.unified == "frozen":
                    self._enforce(name, memory)
                elif key in POINTS:
                    apply_(memory, self.supports[name], Support.project_)
                else:
                    has_sign = "sq" not in key and key not in UNSIGNED
                    apply_(memory, directions if has_sign else directions.unsigned, Support.project_)

    def enforce(self, weights: Mapping[str, Tensor], optimizer: Optimizer | None = None) -> None:
        """Write the constraint into these weights; a weight that fulfils it keeps every bit.

        Args:
            weights: Some of the weights, by name.
            optimizer: The optimizer that stepped them: the constraint is written into its :data:`POINTS` too, which may
                become the weights, as an average does for validation.
        """
        for name, weight in weights.items():
            self._enforce(name, weight.detach())
            for key, memory in _memories(weight, optimizer) if optimizer else ():
                if key in POINTS:
                    self._enforce(name, memory)

    def _enforce(self, name: str, weight: Tensor) -> None:
        if self.unified == "tied":
            apply_(weight, self.supports[name], Support.tie_)
        else:
            apply_(weight, self._directions[name], Support.project_)  # its mask is cached
            apply_(weight, self.supports[name], Support.fill_, self.magnitudes[name].to(weight.dtype))

    def verify(self, weights: Mapping[str, Tensor]) -> None:
        """Check that each of these weights is inside its structure, with ``==``.

        Raises:
            StateError: One does not; the message has its name and its distance. Or a weight has NaN or Inf.
        """
        check_finite(weights)
        for name, weight in weights.items():
            support, weight = self.supports[name], weight.detach()
            if self.unified == "frozen" and largest(weight, support, _moved, self.magnitudes[name]):
                raise StateError(f"{name} has unified blocks that moved, though they are frozen: {_ADVICE}")
            if (error := largest(weight, support, Support.error)) != 0:
                raise StateError(f"{name} is {error:.1e} away from its structure, and must be 0 away: {_ADVICE}")

    def choices(self) -> dict[str, tuple[Support, Tensor]]:
        """Return this rank's support of each weight and the magnitudes at the time of the choice, by name."""
        return {name: (support, self.magnitudes[name]) for name, support in self.supports.items()}

    def state_dict(self, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the supports of these weights as plain dicts, strings and tensors."""
        choices = {name: choice_state(weights[name], *choice) for name, choice in self.choices().items()}
        return {"unified": self.unified, "primal": dict(self.primal), "weights": choices}

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], weights: Mapping[str, Tensor], entries: Mapping[str, PlanEntry]
    ) -> Constraint:
        """Return the constraint that :meth:`state_dict` described, on the devices of these weights, in their dtypes."""
        choices = {
            name: load_choice(weights[name], on_device(saved, weights[name], weights[name].dtype), entries[name].grid)
            for name, saved in state["weights"].items()
        }
        constraint = cls(
            {n: s for n, (s, _) in choices.items()}, {n: m for n, (_, m) in choices.items()}, state["unified"]
        )
        constraint.primal = dict(state["primal"])
        return constraint

    def follow(self, weights: Mapping[str, Tensor]) -> None:
        """Move the constraint to the devices of these weights, after a Trainer moved them."""
        self.supports = {name: support.to(weights[name].device) for name, support in self.supports.items()}
        self.magnitudes = {name: x.to(weights[name].device) for name, x in self.magnitudes.items()}
        self._directions = {n: s if self.unified == "tied" else s.fixed for n, s in self.supports.items()}


@torch.no_grad()
def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Check that no weight has NaN or Inf. It costs one norm a weight; on a mesh, every rank must call it.

    Raises:
        StateError: One has; the message has its name, and how many of its values are not finite.
    """
    for name, weight in weights.items():
        if math.isfinite(norm(weight.detach())):
            continue
        n_bad = int((~torch.isfinite(whole(weight.detach()))).sum())  # 0 where the norm of finite weights overflows
        if n_bad:
            raise StateError(
                f"{name} holds {n_bad} values of {weight.numel()} that are NaN or Inf: lower the learning rate or "
                "clip the gradient, and resume from a checkpoint with finite weights"
            )


def keeps_points(optimizer: Optimizer) -> bool:
    """Return whether an optimizer keeps points beside its weights: see :data:`POINTS`."""
    return any(key in POINTS for memory in optimizer.state.values() for key in memory)


def _memories(weight: Tensor, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield what an optimizer remembers of each entry of a weight, with its name."""
    for key, memory in optimizer.state.get(weight, {}).items():
        if isinstance(memory, Tensor) and memory.shape == weight.shape and memory.dtype.is_floating_point:
            yield key, memory


def _moved(support: Support, weight: Tensor, magnitudes: Tensor) -> float:
    return float(not torch.equal(support.first(weight), magnitudes))


_ADVICE = "something changed it after the optimizer's step; remove that, or let the callback come after it"
