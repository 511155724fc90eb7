"""Which weights of a model a fit covers, and whether the model is that of an earlier fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_muws.structure.plan import Plan, named_weights

UNHELD = "no optimizer trains it"  # the plan's reason


def is_same_model(module: nn.Module, plan: Plan, weights: Mapping[str, nn.Parameter]) -> bool:
    """Return whether this is the model of an earlier fit: the same weights under the same names, and no others.

    Args:
        module: The model that a fit begins with.
        plan: The plan of the earlier fit.
        weights: The weights that the earlier fit covered, by name.
    """
    now = {name: parameter for name, parameter, _ in named_weights(module)}
    before = {entry.name: entry.shape for entry in plan.entries}
    if now.keys() != before.keys() or any(now[name] is not weight for name, weight in weights.items()):
        return False
    return all(not isinstance(p, UninitializedParameter) and tuple(p.shape) == before[n] for n, p in now.items())


def summary(module: nn.Module, plan: Plan) -> str:
    """Return a sentence on the weights that get a structure, and the names and reasons of those that do not.

    Parameters of fewer than two axes, such as biases, never get one and are not listed.
    """
    covered = plan.weights(module)
    n, of = (sum(p.numel() for p in parameters) for parameters in (covered.values(), module.parameters()))
    by_reason: dict[str, list[str]] = {}
    for name, entry in plan.left_out.items():
        if len(entry.shape) >= 2:
            by_reason.setdefault(entry.reason, []).append(name)
    left_out = "; ".join(f"{_shortened(names)} ({reason})" for reason, names in by_reason.items())
    text = f"{len(covered)} parameters with {n:,} of {of:,} weights get a structure"
    return f"{text}; left out: {left_out}" if left_out else text


def _shortened(names: list[str], n_shown: int = 5) -> str:
    more = f" and {len(names) - n_shown} more" if len(names) > n_shown else ""
    return ", ".join(names[:n_shown]) + more


def held(trainer: Any, module: nn.Module) -> list[nn.Parameter] | None:
    """Return the model's parameters that the Trainer's optimizers hold; None if they hold none of them.

    They hold none where the model steps its parameters by itself, for example in its backward pass.
    """
    ids = _held_ids(trainer)
    return [p for p in module.parameters() if id(p) in ids] or None


def late(trainer: Any, module: nn.Module, plan: Plan) -> set[str]:
    """Return the names of the weights that an optimizer holds, and that the plan left out because none did."""
    unheld = {name for name, entry in plan.left_out.items() if entry.reason == UNHELD}
    if not unheld:
        return set()
    ids = _held_ids(trainer)
    return {name for name, parameter, _ in named_weights(module) if name in unheld and id(parameter) in ids}


def _held_ids(trainer: Any) -> set[int]:
    return {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
