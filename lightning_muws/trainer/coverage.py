"""Which weights of a model a fit covers, and whether a fit is one more of the same model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_muws.structure.plan import Plan, named_weights


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
    ids = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    return [p for p in module.parameters() if id(p) in ids] or None
