"""How far a method is from done: the residuals of one weight, and of all weights together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muws.structure.sharded import norm


@dataclass(frozen=True)
class Residuals:
    """Relative residuals of one weight, or of all weights. They have no unit; both fall towards 0.

    Boyd et al. 2011, section 3.3, defines the primal residual ``W - Z`` and the dual residual ``rho * (Z - Z_old)``.
    Here both are divided by ``|W|``, and the dual one also by rho.

    Args:
        primal: ``|W - Z| / |W|``, the distance of the weights from their structure.
        dual: ``|Z - Z_old| / |W|``, the distance that the structured copy moved in the update.
    """

    primal: float
    dual: float = 0.0


def total(residuals: Mapping[str, Residuals], weights: Mapping[str, Tensor]) -> Residuals:
    """Return the residuals of all weights together, as if they were one long vector.

    Args:
        residuals: The residuals of each weight, by name.
        weights: The weights, by name.
    """
    squares = {name: norm(weights[name].detach()) ** 2 for name in residuals}
    size = max(sum(squares.values()), torch.finfo(torch.float32).tiny)
    primal = sum(squares[name] * r.primal**2 for name, r in residuals.items())
    dual = sum(squares[name] * r.dual**2 for name, r in residuals.items())
    return Residuals(math.sqrt(primal / size), math.sqrt(dual / size))
