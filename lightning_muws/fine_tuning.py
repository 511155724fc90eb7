"""Trains a compressed model further, inside its blocks and on its steps, with any optimizer in any loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_muws.compression import CompressReport
from lightning_muws.errors import SettingError, StateError
from lightning_muws.structure.micro import MicroStructure
from lightning_muws.structure.plan import LayerRule, PlanEntry, make_plan, named_weights
from lightning_muws.structure.structure import Structure
from lightning_muws.training.constraint import Constraint
from lightning_muws.training.rounding import Rounding


class FineTuning:
    """Keeps a model that :func:`~lightning_muws.compression.compress` made compressed while it trains on.

    Pruned blocks stay zero and unified blocks keep one magnitude, exactly. All values stay multiples of the steps that
    ``compress`` chose, so that :func:`~lightning_muws.artifact.save.save_compressed` writes what was trained; exact
    values are kept beside them, to which the steps of the optimizer add up
    (:class:`~lightning_muws.training.rounding.Rounding`). The size of the file changes by some per cent.

    Args:
        model: What ``compress`` returned, unchanged since.
        report: What it returned with it.
        structure: What ``compress`` was given.
        rules: What ``compress`` was given.

    Raises:
        PlanError: The rules do not fit the model.
        SettingError: The model, the structure or the rules are not those of the report. The model stays as it is.

    Example:
        >>> from lightning_muws import compress
        >>> _ = torch.manual_seed(0)
        >>> small, report = compress(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)), 8)
        >>> optimizer = torch.optim.Adam(small.parameters(), 1e-3)
        >>> tuning = FineTuning(small, report)
        >>> tuning.attach(optimizer)
        >>> small(torch.randn(8, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> tuning.verify()  # it raises if a value is not what the file would hold
    """

    def __init__(
        self,
        model: nn.Module,
        report: CompressReport,
        structure: Structure = MicroStructure(),
        rules: Sequence[LayerRule] = (),
    ) -> None:
        plan = make_plan(model, structure, rules, open_ratios=True)
        counts = {layer.name: layer.counts for layer in report.layers}
        entries = {name: _settled(entry, counts.get(name)) for name, entry in plan.covered.items()}
        if left := {name for name, kinds in counts.items() if any(kinds)} - set(entries):
            raise SettingError(
                f"the report has blocks of {min(left)}, which is not covered here: give the structure and the rules of "
                "compress, and a model whose parameters require gradients"
            )
        self.parameters = {name: p for name, p, _ in named_weights(model)}
        self.weights = plan.weights(model)
        before = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.constraint = Constraint.freeze(self.weights, entries)
        self.rounding = Rounding(self.constraint.supports)
        self.rounding.start(self.parameters, {name: step for name, step in report.steps.items() if step})
        moved = [name for name, p in self.parameters.items() if not torch.equal(before[name], p.detach())]
        if moved:
            for name, p in self.parameters.items():
                p.data.copy_(before[name])
            raise SettingError(
                f"{moved[0]} is not as the report says: give the model that compress returned with this report, before "
                "anything changes it, and the structure and rules that compress was given"
            )

    def attach(self, optimizer: Optimizer) -> None:
        """Let each step of the optimizer end inside the blocks and on the steps.

        Gradients are projected before each step; what the optimizer remembers of the weights is projected now. Call it
        once the model is on its device.

        Raises:
            SettingError: The optimizer holds no parameter of the model.
        """
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        parameters: dict[str, Tensor] = {name: p for name, p in self.parameters.items() if id(p) in held}
        weights: dict[str, Tensor] = {name: p for name, p in self.weights.items() if id(p) in held}
        if not parameters:
            raise SettingError("the optimizer holds no parameter of the model: make it of model.parameters()")
        self.constraint.follow(self.weights)
        self.rounding.follow(self.parameters, self.constraint.supports)
        self.constraint.project_moments(weights, optimizer)
        exact = {name: p for name, p in weights.items() if name not in self.rounding.steps}

        def before(*_: Any) -> None:
            self.constraint.project_gradients(weights)

        def after(*_: Any) -> None:
            self.constraint.enforce(exact, optimizer)
            self.rounding.after_step(parameters)

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    def verify(self) -> None:
        """Check with ``==`` that all weights are inside their blocks and on their steps.

        Raises:
            StateError: One is not; the message has its name. Or a weight has NaN or Inf.
        """
        self.constraint.verify(self.weights)
        self.rounding.verify(self.parameters)

    def state_dict(self) -> dict[str, Any]:
        """Return the exact values beside the rounded ones; save it with the model and the optimizer."""
        return self.rounding.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, after the model's own state.

        Raises:
            StateError: It is of another model, or the model's state was not loaded.
        """
        if state.get("steps") != self.rounding.steps:
            raise StateError("this state is of another compressed model: compress the same model in the same way first")
        self.rounding.load_state_dict(state, self.parameters)
        self.verify()


def _settled(entry: PlanEntry, counts: tuple[int, int, int] | None) -> PlanEntry:
    """Return the entry with the shares of blocks that a weight has.

    Raises:
        SettingError: The report does not know the weight, or it has another number of blocks.
    """
    if counts is None or sum(counts) != entry.n_blocks:
        raise SettingError(
            f"the report has no weight {entry.name} of {entry.n_blocks} blocks: give the model, the structure and the "
            "rules of the report"
        )
    if not isinstance(entry.structure, MicroStructure):
        return entry
    _, n_unified, n_pruned = counts
    structure = replace(entry.structure, prune_ratio=n_pruned / entry.n_blocks, unify_ratio=n_unified / entry.n_blocks)
    return replace(entry, structure=structure)
