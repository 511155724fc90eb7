"""The life of a compression: dense, then a training method such as ADMM, then retraining inside the structure."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_muws.errors import SettingError, StateError
from lightning_muws.structure.budget import RECOVERY
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.micro import MicroStructure
from lightning_muws.structure.plan import PlanEntry, clean_name
from lightning_muws.structure.sharded import gathered, is_sharded, like, whole
from lightning_muws.structure.speed import NetworkTimes
from lightning_muws.structure.support import Support
from lightning_muws.training.budget import Budget, choose_shapes, open_structures, settled
from lightning_muws.training.checks import check_type
from lightning_muws.training.constraint import Constraint, check_finite, keeps_points
from lightning_muws.training.method import Method
from lightning_muws.training.methods import AUTO, choose_method, make_method
from lightning_muws.training.penalty import Penalty
from lightning_muws.training.phases import Phases, Retraining, Timeline, is_method
from lightning_muws.training.record import plain, record, refuse_differences
from lightning_muws.training.residuals import Residuals, total
from lightning_muws.training.rounding import Rounding, Stepper

STATE_VERSION = 3
MARGIN = 1.02  # by how much smaller a file is chosen, as training goes on after the last choice; the demo's grew by 2 %


@dataclass(frozen=True)
class Update:
    """One update of a run's method, or its hard projection at the end, over all covered weights.

    Args:
        when: The epoch (or step) at whose start it happened; within an epoch with its fraction.
        rho: The penalty factor before the update.
        primal: ``|W - Z| / |W|``.
        dual: ``|Z - Z_old| / |W|``.
    """

    when: float
    rho: float
    primal: float
    dual: float


class CompressionRun:
    """Compresses named weights over a training run, in plain torch. The caller owns the loop.

    Call :meth:`tick` at the start of each epoch (or batch), :meth:`before_step` when the gradients are complete, and
    :meth:`after_step` after the optimizer's step. The run is first ``dense``, then it trains with its method
    (``admm``), and then it is in ``retraining``, where every step ends inside the structure, to the bit.

    Args:
        weights: The covered parameters, by name.
        entries: The structure of each: a plan's ``covered``.
        phases: When the method starts, updates and ends, and which method it is.
        retraining: How to train on inside the structure. Its schedule and rate are for the caller to follow.
        penalty: How hard the method pulls.
        budget: A size, speed or error, for which the structures of open entries are chosen once: when the method
            starts, or at the freeze without a method. Make the plan with ``open_ratios=True``.
        module: The network, whose state_dict the file will hold; needed with a budget.
        times: What the layers take, of :func:`lightning_muws.layer_times`; needed for ``Budget(speedup=...)``. Ranks
            measure other times: measure on one, and give all ranks its times.
        stepper: Chooses the steps of the file for ``Budget(compression=...)``, so that from ``phases.round_start`` on
            retraining sees the values of the file. See :func:`lightning_muws.choose_steps`. Ranks must get equal steps.
            None to round after training. With frozen magnitudes, or an optimizer that keeps points beside the weights,
            nothing is rounded in training either.

    Raises:
        SettingError: A setting has a wrong type, or a budget has no module.

    Example:
        >>> from lightning_muws import Budget, CompressionRun, MicroStructure, Penalty, Phases, Retraining
        >>> from lightning_muws.structure.plan import make_plan
        >>> layer, phases = nn.Linear(8, 8), Phases(admm_start=0, admm_end=4, update_every=1)
        >>> plan = make_plan(layer, MicroStructure(prune_ratio=0.5))
        >>> run = CompressionRun(plan.weights(layer), plan.covered, phases, Retraining(), Penalty(rho=0.1))
        >>> optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        >>> for epoch in range(6):
        ...     due = run.tick(epoch, phases.on(6), [optimizer])
        ...     for batch in torch.eye(8).split(4):
        ...         optimizer.zero_grad()
        ...         layer(batch).square().sum().backward()
        ...         run.before_step(optimizer)
        ...         optimizer.step()
        ...         run.after_step(optimizer)
        >>> run.phase, int((layer.weight == 0).sum())
        ('retraining', 32)
        >>> run.verify()  # every weight is inside its structure, or this raises

        With a budget, a size takes the place of the ratios:

        >>> layer = nn.Linear(64, 64)
        >>> plan = make_plan(layer, MicroStructure(), open_ratios=True)
        >>> budget = Budget(compression=6)
        >>> run = CompressionRun(plan.weights(layer), plan.covered, phases, budget=budget, module=layer)
        >>> run.tick(0, phases.on(6), [])  # ADMM starts, with the structures that the budget chose
        True
        >>> structure = run.planned["weight"].structure
        >>> structure.prune_ratio + structure.unify_ratio > 0.1
        True

        After training, ``save_compressed(layer, "layer.muws", compression=6)`` writes a file of this size. A speedup
        needs the times of the layers for an input as in use, here measured on one row:

        >>> from lightning_muws import layer_times
        >>> times = layer_times(layer, torch.ones(1, 64), plan.covered)
        >>> fast = CompressionRun(
        ...     plan.weights(layer), plan.covered, phases, budget=Budget(speedup=2), module=layer, times=times
        ... )
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        entries: Mapping[str, PlanEntry],
        phases: Phases = Phases(),
        retraining: Retraining = Retraining(),
        penalty: Penalty = Penalty(),
        budget: Budget | None = None,
        module: nn.Module | None = None,
        times: NetworkTimes | None = None,
        stepper: Stepper | None = None,
    ) -> None:
        check_type("phases", phases, Phases, "Phases(admm_end=0.5)")
        check_type("retraining", retraining, Retraining, "Retraining(unified='tied')")
        check_type("penalty", penalty, Penalty, "Penalty(rho=0.003)")
        phases.check_penalty(penalty)
        if budget is not None:
            check_type("budget", budget, Budget, "Budget(compression=20)")
            check_type("module", module, nn.Module, "the network whose file the budget is for")
        if times is not None:
            check_type("times", times, NetworkTimes, "layer_times(module, example_input, plan.covered)")
        self.weights, self.entries = dict(weights), dict(entries)
        self.budget, self._module, self.times, self.stepper = budget, module, times, stepper
        # all that may be rounded, as objects: FSDP2 gives a module other parameters while it computes
        self.parameters = {clean_name(name): p for name, p in module.named_parameters()} if module else dict(weights)
        self.predicted_speedup: float | None = None  # of the structures that were chosen for a speedup
        self._given = self.weights, self.entries  # before the budget chose
        self._chosen: dict[str, MicroStructure] | None = None
        self.phases, self.retraining, self.penalty = phases, retraining, penalty
        self.method: Method | None = None
        self._method_name = phases.method
        self.constraint: Constraint | None = None
        self.rounding: Rounding | None = None
        self.history: list[Update] = []
        self._last_tick: float = -1
        self._raw: dict[str, Tensor] = {}
        self._held: dict[int, tuple[Optimizer, int, dict[str, nn.Parameter]]] = {}

    @property
    def phase(self) -> str:
        """``dense`` at first, then the name of the method (``admm``), then ``retraining``."""
        if self.constraint:
            return "retraining"
        return self._method_name if self.method else "dense"

    @property
    def supports(self) -> dict[str, Support]:
        """The frozen structure of each weight, by name; else empty. A collective where weights are sharded."""
        chosen = self.constraint.choices() if self.constraint else {}
        return {name: gathered(self.weights[name], *choice)[0] for name, choice in chosen.items()}

    @property
    def planned(self) -> dict[str, PlanEntry]:
        """The entries that were given, by name; with the structures that were chosen, once they are."""
        return settled(self._given[1], self._chosen or {})

    def check_budget(self) -> None:
        """Check that the budget can be met with the present values of the module; do nothing once it has been spent.

        A collective where tensors are sharded.

        Raises:
            SettingError: It cannot; the message has what can be reached.
            StateError: A parameter has NaN or Inf.
        """
        if self.budget and self._module and self._chosen is None:
            self.budget.check(self._module, self._given[1], self.times)

    @property
    def needs_times(self) -> bool:
        """Whether a speedup is to be chosen, and the times for it have not been given."""
        return bool(self.budget and self.budget.speedup) and self._chosen is None and self.times is None

    # ---- the caller's loop

    def tick(self, now: float, timeline: Timeline, optimizers: Iterable[Optimizer]) -> bool:
        """Do what is due at this epoch (or step), once: start the method, update it, freeze the structure, or round.

        Args:
            now: The epoch (or step) that begins; within an epoch with its fraction.
            timeline: The phases as counts: ``phases.on(length)``.
            optimizers: The optimizers whose moments are projected when the structure is frozen.

        Returns:
            Whether something was due.

        Raises:
            SettingError: The method does not work with one of the optimizers.
            StateError: A weight has NaN or Inf.
        """
        if now <= self._last_tick:
            return False
        if self.constraint:
            return self._round(now, timeline, optimizers)
        optimizers, rounds = list(optimizers), timeline.round_start < math.inf
        is_wrong = self._method_name == "straight_through" and any(keeps_points(optimizer) for optimizer in optimizers)
        if self.method and self.phases.method == AUTO and is_wrong:  # an optimizer shows it only after its first step
            self.method.finish(self.weights)
            self._start_method(rounds, optimizers)
        if self.method:
            self.method.check(optimizers)
        if now >= timeline.end:
            self.choose_structures(will_round=rounds)
            self.freeze(now, optimizers)
        elif self.method is None and now >= timeline.start:
            self.choose_structures(will_round=rounds)
            self._start_method(rounds, optimizers)
        elif self.method and self.method.advance(self.weights, timeline.share(now)):
            pass
        elif self.method and (due := timeline.due(now, self._last_tick)):
            rho, residuals = self.method.rho, self.method.update(self.weights, due)
            self._remember(now, rho, residuals)
        else:
            return False
        self._last_tick = now
        return True

    def reset_clock(self) -> None:
        """Let the time of the next :meth:`tick` be any."""
        self._last_tick = -1

    def freeze(self, now: float, optimizers: Iterable[Optimizer]) -> None:
        """Choose the structure, project the weights onto it, and project the moments that these optimizers keep.

        Args:
            now: The epoch (or step), for :attr:`history`.
            optimizers: The optimizers that step the weights.

        Raises:
            StateError: A weight has NaN or Inf; nothing is changed then.
        """
        rho = self.method.rho if self.method else 0.0
        self.choose_structures()
        if self.method:
            check_finite(self.weights)  # before a method writes to them
            self.method.finish(self.weights)
        self.constraint = Constraint.freeze(self.weights, self.entries, self.retraining.unified)
        self.method = None
        self._remember(now, rho, {name: Residuals(primal) for name, primal in self.constraint.primal.items()})
        for optimizer in optimizers:
            self.constraint.project_moments(self.owned(optimizer), optimizer)
        self._held = {}  # retraining may have new optimizers: do not keep the old moments alive

    def _round(self, now: float, timeline: Timeline, optimizers: Iterable[Optimizer]) -> bool:
        """Choose the steps of the file and round to them, if that is due; return whether it was."""
        if not timeline.rounds_due(now, self._last_tick if self.rounding else -1):
            return False
        self._last_tick = now
        found = self._rounded_by
        if not found or any(keeps_points(optimizer) for optimizer in optimizers):
            return False
        self._start_rounding(found[0], MARGIN * found[1], found[1])
        return True

    def _start_rounding(self, stepper: Stepper, *compressions: float) -> None:
        """Round for the first of these compressions that a file can have; with a warning not at all if it has none."""
        if self.constraint:
            self.rounding = self.rounding or Rounding(self.constraint.supports)
            self.rounding.restore(self.parameters)
            self.rounding.start(self.parameters, self._choose_steps(stepper, *compressions))
            self._held = {}

    def _choose_steps(self, stepper: Stepper, compression: float, *others: float) -> Mapping[str, float]:
        try:
            return stepper(self._grids, compression)
        except SettingError as error:  # not raised: training would be lost
            if others:
                return self._choose_steps(stepper, *others)
            warnings.warn(f"retraining goes on with values that are not rounded: {error}", stacklevel=2)
            return {}

    def finish(self) -> bool:
        """Round to coarser steps if the rounded parameters grew too large for the file since the last choice of steps.

        Call it after the last step. It does nothing where nothing is rounded.

        Returns:
            Whether that was so.
        """
        found = self._rounded_by
        if not self.rounding or not found or not self._choose_steps(*found):  # all of it fits without loss
            return False
        self._start_rounding(*found)
        return True

    @property
    def _grids(self) -> dict[str, BlockGrid]:
        return {name: entry.grid for name, entry in self.entries.items()}

    @property
    def can_round(self) -> bool:
        """Whether retraining can round for a compression: something chooses steps, and magnitudes train."""
        return bool(self.stepper) and self.retraining.unified == "tied"

    @property
    def _rounded_by(self) -> tuple[Stepper, float] | None:
        compression = self.budget.compression if self.budget else None
        return (self.stepper, compression) if self.stepper and compression and self.can_round else None

    def choose_structures(self, *, will_round: bool = False) -> None:
        """Choose what is open in the structures, for the budget if there is one, unless it has been done.

        Args:
            will_round: Whether retraining will round, if it can: then training recovers from rounding, too.

        Raises:
            SettingError: The budget cannot be met; the message has what can.
            StateError: A weight has NaN or Inf.
        """
        if self._chosen is not None:
            return
        weights, entries = self._given
        if self.budget and self._module:
            recovery = 1.0 if will_round and self.can_round else RECOVERY
            chosen = self.budget.choose(self._module, entries, self.times, recovery)
            self._adopt(chosen)
            if self.budget.speedup is not None and self.times:
                self.predicted_speedup = self.times.speedup(chosen)
        elif open_structures(entries):
            self._adopt(choose_shapes(weights, entries))

    def _adopt(self, chosen: dict[str, MicroStructure] | None) -> None:
        """Give the weights the structures that were chosen; None for those that were given."""
        weights, _ = self._given
        self._chosen = chosen
        self.entries = {name: entry for name, entry in self.planned.items() if not entry.reason}
        self.weights = {name: weights[name] for name in self.entries}
        self._held = {}

    def before_step(self, optimizer: Optimizer, scale: float = 1.0) -> None:
        """Change the gradients of this optimizer's weights: the method adds to them, or retraining projects them.

        A parameter group with ``maximize=True`` climbs its gradient, so the method's share has the opposite sign.

        Args:
            optimizer: The optimizer that steps next; its gradients are complete and not clipped yet.
            scale: Factor of these gradients on those of the loss, such as that of a gradient scaler; 0 adds nothing.
        """
        if self.constraint:
            self.constraint.project_gradients(self.owned(optimizer))
        elif self.method and scale:
            climbing = {id(p) for g in optimizer.param_groups if g.get("maximize") for p in g["params"]}
            owned = self.owned(optimizer)
            up = {name: p for name, p in owned.items() if id(p) in climbing}
            self.method.before_step({name: p for name, p in owned.items() if name not in up}, scale)
            self.method.before_step(up, -scale)

    def after_step(self, optimizer: Optimizer) -> None:
        """Change this optimizer's weights: in retraining, write the structure back, to the bit, and round."""
        if self.constraint:
            self.constraint.enforce(self.owned(optimizer), optimizer)
            self._round_again(self.held(optimizer))
        elif self.method:
            self.method.after_step(self.owned(optimizer))

    def settle(self, names: Iterable[str]) -> None:
        """Write the structure and the rounding back into these weights, which something else has changed."""
        if self.constraint:
            self.constraint.enforce({name: self.weights[name] for name in names if name in self.weights})
            self._round_again({name: p for name, p in self.watched.items() if name in set(names)})

    def _round_again(self, parameters: Mapping[str, nn.Parameter]) -> None:
        if self.rounding:
            self.rounding.after_step(parameters)

    def owned(self, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        """Return the covered weights that an optimizer steps, by name, without those that do not require a gradient."""
        return {name: p for name, p in self.held(optimizer).items() if name in self.weights}

    def held(self, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        """Return what an optimizer steps of the covered weights and the rounded parameters; see :meth:`owned`."""
        n_parameters = sum(len(group["params"]) for group in optimizer.param_groups)  # groups may join in mid-fit
        known, n_known, held = self._held.get(id(optimizer), (None, 0, {}))
        if known is not optimizer or n_known != n_parameters:
            ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
            held = {name: p for name, p in self.watched.items() if id(p) in ids}
            self._held[id(optimizer)] = optimizer, n_parameters, held
        return {name: p for name, p in held.items() if p.requires_grad}

    @property
    def watched(self) -> dict[str, nn.Parameter]:
        """The covered weights, and the parameters that are rounded, by name."""
        if not self.rounding:
            return self.weights
        return self.weights | {name: p for name, p in self.parameters.items() if name in self.rounding.steps}

    def metrics(self) -> dict[str, float | Tensor]:
        """Return what to log: phase (0 dense, 1 method, 2 retraining), rho, penalty, the last update's residuals."""
        metrics: dict[str, float | Tensor] = {"phase": 2.0 if self.constraint else 1.0 if self.method else 0.0}
        if self.method:
            metrics |= {"rho": self.method.rho, **self.method.metrics(self.weights)}
        if self.history:
            metrics |= {"primal_residual": self.history[-1].primal, "dual_residual": self.history[-1].dual}
        return metrics

    # ---- the projected network, for validation

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
        """Restore the weights that :meth:`show_projected` replaced; do nothing if it replaced none."""
        for name, value in self._raw.items():
            self.weights[name].copy_(value)
        self._raw = {}

    @property
    def raw(self) -> dict[str, Tensor]:
        """The original weights while their projections are shown, by name; else empty."""
        return self._raw

    # ---- checks

    def fingerprint(self) -> int:
        """Return a checksum of the structures, the choices of blocks and the magnitudes; ranks in step have the same.

        Sharded weights are left out: each rank has its part of a choice that all made from the same gathered bits.
        """
        chooser, checksum = self.constraint or self.method, zlib.crc32(repr(record(self.entries)).encode())
        for name, (support, magnitudes) in chooser.choices().items() if chooser else ():
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
        """Check that every weight is inside its structure, and every rounded one a multiple of its step, with ``==``.

        Raises:
            StateError: A weight is not, or it has NaN or Inf, or the structure is not frozen yet.
        """
        if self.constraint is None:
            raise StateError(
                f"no structure is frozen yet, the run is in its {self.phase} phase: train past admm_end first"
            )
        self.follow()
        self.constraint.verify(self.weights)
        if self.rounding:
            self.rounding.verify(self.parameters)

    def follow(self) -> None:
        """Move what the run keeps for retraining to the devices of the weights, after a Trainer moved them."""
        if self.constraint:
            self.constraint.follow(self.weights)
            if self.rounding:
                self.rounding.follow(self.parameters, self.constraint.supports)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain dicts, lists, strings, numbers and tensors: ``weights_only=True`` can load it."""
        state: dict[str, Any] = {"version": STATE_VERSION, "phase": self.phase, "last_tick": self._last_tick}
        state["history"] = [dict(vars(update)) for update in self.history]
        state["settings"] = self._settings(self.phase, self._method_name)
        if self.constraint:
            state["constraint"] = self.constraint.state_dict(self.weights)
            if self.rounding:
                state["rounding"] = self.rounding.state_dict()
        elif self.method:
            state["method"] = self.method.state_dict()
        if self._chosen is not None:
            state["chosen"] = {name: plain(structure) for name, structure in self._chosen.items()}
            state["predicted_speedup"] = self.predicted_speedup
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state, onto the devices of the weights. The caller restores the weights.

        The state must be of the same weights, with the same shapes, grids and structures. In the method's phase the
        method and ``phases.interval`` must be the same too, in retraining ``retraining.unified``; in both phases the
        budget, whose choice comes from the state. A dense run depends on none of these. All other settings may change:

        - ``phases.admm_start``, ``admm_end``, ``update_every`` and ``round_start`` hold from the next :meth:`tick` on;
          what is rounded in the state stays so.
        - ``penalty.rho_growth``, ``rho_max`` and ``balance`` hold from the next update on. ``penalty.rho`` and
          ``relative`` are how a method starts; a method that has started goes on from the rho of the state.
        - ``retraining.schedule`` and ``lr`` belong to the caller, as do a callback's ``save_to`` and
          ``validate_projected``.

        Raises:
            StateError: The state has another version, or depends on settings that differ; nothing is changed then.
        """
        if state.get("version") != STATE_VERSION:
            raise StateError(
                f"the checkpoint's state has version {state.get('version')}, and this lightning_muws reads version "
                f"{STATE_VERSION}: resume with the release that wrote it, or begin a new fit from its weights alone"
            )
        method = self.phases.method
        if method == AUTO and is_method(chosen := state["settings"].get("phases.method")):
            method = chosen
        refuse_differences(state["settings"], self._settings(state["phase"], method))
        self._method_name = method
        self.method = self.constraint = self.rounding = None
        self._adopt(_restored(state["chosen"]) if "chosen" in state else None)
        self.predicted_speedup = state.get("predicted_speedup")
        if "constraint" in state:
            self.constraint = Constraint.from_state_dict(state["constraint"], self.weights, self.entries)
            if "rounding" in state:
                self.rounding = Rounding(self.constraint.supports)
                self.rounding.load_state_dict(state["rounding"], self.parameters)
        elif "method" in state:
            self.method = self._new_method()
            self.method.load_state_dict(state["method"], self.weights)
        self._last_tick = state["last_tick"]
        self.history = [Update(**update) for update in state["history"]]

    def _settings(self, phase: str, method: str) -> dict[str, Any]:
        """Return the settings that a state of this phase depends on, as plain values."""
        if phase == "dense":
            return {}
        given = record(self._given[1])
        if self.budget:
            given = {"budget": plain(self.budget), **given}
        if phase == "retraining":
            return {"retraining.unified": self.retraining.unified, **given}
        times = {"phases.method": method, "phases.interval": self.phases.interval}
        return {**times, **given}

    def _choose_method(self, rounds: bool, optimizers: Iterable[Optimizer]) -> str:
        rounds = rounds and self._rounded_by is not None
        return choose_method(self.phases.method, rounds=rounds, penalty=self.penalty, optimizers=optimizers)

    def _start_method(self, rounds: bool, optimizers: Iterable[Optimizer]) -> None:
        self._method_name = self._choose_method(rounds, optimizers)
        method = self._new_method()
        method.start(self.weights)
        self.method = method

    def _new_method(self) -> Method:
        return make_method(self._method_name, self.entries, self.penalty)

    def _remember(self, now: float, rho: float, residuals: Mapping[str, Residuals]) -> None:
        overall = total(residuals, self.weights)
        self.history.append(Update(now, rho, overall.primal, overall.dual))


def _restored(chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, MicroStructure]:
    """Return the structures that a state has."""
    return {name: MicroStructure(**{key: x for key, x in s.items() if key != "type"}) for name, s in chosen.items()}
