"""The life of a compression: dense, then ADMM, then retraining inside the structure. Plain torch, for any loop."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_muws.errors import StateError
from lightning_muws.structure.plan import PlanEntry
from lightning_muws.structure.sharded import gathered, is_sharded, like, whole
from lightning_muws.structure.support import Support
from lightning_muws.training.admm import Admm, Residuals, total
from lightning_muws.training.constraint import Constraint, check_finite
from lightning_muws.training.penalty import Penalty
from lightning_muws.training.phases import Phases, Retraining, Timeline

Phase = Literal["dense", "admm", "retraining"]
PHASES: tuple[Phase, ...] = ("dense", "admm", "retraining")
STATE_VERSION = 1


@dataclass(frozen=True)
class Update:
    """One Z/U update of a run, or its hard projection, over all covered weights.

    Args:
        when: The epoch (or step) at whose start it happened; within an epoch with its fraction.
        rho: The penalty factor that led there.
        primal: ``|W - Z| / |W|``.
        dual: ``|Z - Z_old| / |W|``.
    """

    when: float
    rho: float
    primal: float
    dual: float


class CompressionRun:
    """What happens to a set of named weights over a training run; the caller owns the loop and says when.

    Call :meth:`tick` at the start of each epoch (or batch), :meth:`before_step` when gradients are complete, and
    :meth:`after_step` after the optimizer's step.

    Args:
        weights: The covered parameters, by name.
        entries: What each becomes: a plan's ``covered``.
        phases: When ADMM starts, updates and ends.
        retraining: How to train on inside the structure.
        penalty: How hard ADMM pulls.

    Example:
        >>> from lightning_muws.structure.plan import MicroStructure, make_plan
        >>> layer, phases = nn.Linear(8, 8), Phases(admm_end=2)
        >>> plan = make_plan(layer, MicroStructure(prune_ratio=0.5))
        >>> run = CompressionRun(plan.weights(layer), plan.covered, phases, Retraining())
        >>> optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        >>> for epoch in range(3):
        ...     due = run.tick(epoch, phases.on(3), [optimizer])
        ...     optimizer.zero_grad()
        ...     layer(torch.ones(8)).square().sum().backward()
        ...     run.before_step(optimizer)
        ...     optimizer.step()
        ...     run.after_step(optimizer)
        >>> run.phase, int((layer.weight == 0).sum())
        ('retraining', 32)
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        entries: Mapping[str, PlanEntry],
        phases: Phases,
        retraining: Retraining,
        penalty: Penalty = Penalty(),
    ) -> None:
        self.weights, self.entries, self.phases, self.retraining = dict(weights), dict(entries), phases, retraining
        self.penalty = penalty
        self.admm: Admm | None = None
        self.constraint: Constraint | None = None
        self.history: list[Update] = []
        self._last_tick: float = -1
        self._raw: dict[str, Tensor] = {}
        self._owned: dict[int, tuple[Optimizer, int, dict[str, nn.Parameter]]] = {}

    @property
    def phase(self) -> Phase:
        """``dense`` before ADMM, ``admm``, or ``retraining`` inside the structure."""
        return "retraining" if self.constraint else "admm" if self.admm else "dense"

    @property
    def supports(self) -> dict[str, Support]:
        """The frozen structure of each weight, by name; else empty. A collective where weights are sharded."""
        chosen = self.constraint.choices() if self.constraint else {}
        return {name: gathered(self.weights[name], *choice)[0] for name, choice in chosen.items()}

    def tick(self, now: float, timeline: Timeline, optimizers: Iterable[Optimizer]) -> bool:
        """Do what is due at this epoch (or step), once: start ADMM, update Z and U, or freeze the structure.

        Returns:
            Whether there was something to do.

        Raises:
            StateError: A weight has NaN or Inf.
        """
        if now <= self._last_tick or self.constraint:
            return False
        if now >= timeline.end:
            self.freeze(now, optimizers)
        elif self.admm is None and now >= timeline.start:
            self.admm = self._new_admm()
            self.admm.start(self.weights)
        elif self.admm and (due := timeline.due(now, self._last_tick)):
            rho, residuals = self.admm.rho, self.admm.update(self.weights, due)
            overall = total(residuals, self.weights)
            self.history.append(Update(now, rho, overall.primal, overall.dual))
        else:
            return False
        self._last_tick = now
        return True

    def freeze(self, now: float, optimizers: Iterable[Optimizer]) -> None:
        """Choose the structure, project the weights, and the moments that these optimizers keep of them.

        Raises:
            StateError: A weight has NaN or Inf; nothing is changed then.
        """
        rho = self.admm.rho if self.admm else 0.0
        self.constraint = Constraint.freeze(self.weights, self.entries, self.retraining.unified)
        self.admm = None
        overall = total({n: Residuals(r, 0.0) for n, r in self.constraint.primal.items()}, self.weights)
        self.history.append(Update(now, rho, overall.primal, overall.dual))
        for optimizer in optimizers:
            self.constraint.project_moments(self.owned(optimizer), optimizer)
        self._owned = {}  # retraining may make its optimizers anew: keep none of the old moments alive

    def before_step(self, optimizer: Optimizer, scale: float = 1.0) -> None:
        """Add the penalty's gradient, ``scale`` times, or project the gradients; of the weights of this optimizer."""
        if self.constraint:
            self.constraint.project_gradients(self.owned(optimizer))
        elif self.admm and scale:
            self.admm.add_penalty_gradient(self.owned(optimizer), scale)

    def after_step(self, optimizer: Optimizer) -> None:
        """Hold the weights of this optimizer to their structure, to the bit."""
        if self.constraint:
            self.constraint.enforce(self.owned(optimizer))

    def owned(self, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        """Return the covered weights that an optimizer steps now: not those that are frozen at the moment."""
        n_parameters = sum(len(group["params"]) for group in optimizer.param_groups)  # groups may join in mid-fit
        known, n_known, owned = self._owned.get(id(optimizer), (None, 0, {}))
        if known is not optimizer or n_known != n_parameters:
            ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
            owned = {name: p for name, p in self.weights.items() if id(p) in ids}
            self._owned[id(optimizer)] = optimizer, n_parameters, owned
        return {name: p for name, p in owned.items() if p.requires_grad}

    def metrics(self) -> dict[str, float | Tensor]:
        """Return what there is to log: phase (0, 1, 2), rho, penalty, and the residuals of the last update."""
        metrics: dict[str, float | Tensor] = {"phase": float(PHASES.index(self.phase))}
        if self.admm:
            metrics |= {"rho": self.admm.rho, "penalty": self.admm.penalty(self.weights)}
        if self.history:
            metrics |= {"primal_residual": self.history[-1].primal, "dual_residual": self.history[-1].dual}
        return metrics

    @torch.no_grad()
    def show_projected(self) -> None:
        """Swap the weights for their projections, until :meth:`show_raw`.

        Raises:
            StateError: A weight has NaN or Inf; nothing is changed then.
        """
        try:
            for name, entry in self.entries.items():  # one at a time: never two copies of all weights
                weight = self.weights[name]
                projected = like(entry.structure.project(whole(weight), entry.grid, name), weight)
                self._raw[name] = weight.detach().clone()
                weight.copy_(projected)
        except StateError:
            self.show_raw()
            raise

    @torch.no_grad()
    def show_raw(self) -> None:
        """Bring the weights back that :meth:`show_projected` put aside, if it did."""
        for name, value in self._raw.items():
            self.weights[name].copy_(value)
        self._raw = {}

    @property
    def raw(self) -> dict[str, Tensor]:
        """The weights put aside while projected ones are shown, by name; else empty."""
        return self._raw

    def fingerprint(self) -> int:
        """Return a checksum of the choices of blocks and of the magnitudes: the same on each rank, if all is well.

        Sharded weights are left out: each rank has its own part of a choice that all made of the same gathered bits.
        """
        engine, checksum = self.constraint or self.admm, 0
        for name, (support, magnitudes) in engine.choices().items() if engine else ():
            for tensor in () if is_sharded(self.weights[name]) else (support.kinds, support.negative, magnitudes):
                checksum = zlib.crc32(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes(), checksum)
        return checksum

    def check_finite(self) -> None:
        """Check that no covered weight has NaN or Inf, in any phase. Call it now and then, and before saving.

        It costs one norm a weight. Where weights are sharded, every rank must call it.

        Raises:
            StateError: A weight has; the message has its name, and how many of its values are not finite.
        """
        check_finite(self.weights)

    def verify(self) -> None:
        """Check that every weight is inside its structure, with ``==``.

        Raises:
            StateError: A weight is not, or it has NaN or Inf, or the structure is not frozen yet.
        """
        if self.constraint is None:
            raise StateError(
                f"no structure is frozen yet, the run is in its {self.phase} phase: train past admm_end first"
            )
        self.constraint.follow(self.weights)
        self.constraint.verify(self.weights)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain dicts, lists, strings, numbers and tensors."""
        state: dict[str, Any] = {"version": STATE_VERSION, "phase": self.phase, "last_tick": self._last_tick}
        state["history"] = [dict(vars(update)) for update in self.history]
        if self.constraint:
            return state | {"engine": self.constraint.state_dict(self.weights)}
        return state | ({"engine": self.admm.state_dict()} if self.admm else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state, on the devices of the weights, which the caller restores himself.

        Raises:
            StateError: The state is of another version, or of other weights.
        """
        if state["version"] != STATE_VERSION:
            raise StateError(
                f"the state has version {state['version']}, this package reads {STATE_VERSION}: install its own"
            )
        self.admm = self.constraint = None
        if state["phase"] == "admm":
            self.admm = self._new_admm()
            self.admm.load_state_dict(state["engine"], self.weights)
        elif state["phase"] == "retraining":
            self.constraint = Constraint.from_state_dict(state["engine"], self.weights, self.entries)
        self._last_tick = state["last_tick"]
        self.history = [Update(**update) for update in state["history"]]

    def _new_admm(self) -> Admm:
        return Admm(self.entries, self.penalty)
