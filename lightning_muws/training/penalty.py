"""How hard a training method pulls the weights towards their structure: the penalty factor rho and its growth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_muws.training.checks import is_number, refuse

FAR = 10.0  # residuals further apart than this factor are balanced: mu of Boyd et al. 2011, section 3.4.1


@dataclass(frozen=True)
class Penalty:
    """The penalty factor rho, and how it changes.

    In ADMM rho weighs the penalty ``rho / 2 * |W - Z + U|^2`` of each weight (Boyd et al. 2011, section 3.1.1), here
    divided by ``|W|^2``, with the norm ``|W|`` at the start: a relative distance of 1 costs ``rho / 2`` units of the
    loss, however many weights there are and however large they are. A changing rho is section 3.4.1 there, "Varying
    penalty parameter".

    If a layer is scaled by c and the loss divides it by c again, the weights, Z and U of every step are
    c times as large, for an optimizer whose steps are (Adam with c times the rate, SGD with c^2 times the rate).

    Args:
        rho: Penalty factor at the start, in units of the loss; if not relative, of the loss per squared weight.
        rho_growth: Factor on rho after each update; an update that stands for several multiplies it as often.
        rho_max: Where rho stops growing.
        relative: Whether the penalty is divided by the squared norm of each weight; False for that of Boyd et al.
        balance: ``none``: rho always grows. ``network``: rho grows only while the primal residual ``|W - Z|`` is more
            than 10 times the dual one ``rho * |Z - Z_old|``, shrinks by the same factor while the dual one is more than
            10 times the primal one, and else stays (section 3.4.1). ``weight``: the same for each weight, with its own
            residuals and its own rho.

    Raises:
        SettingError: A value has a wrong type or is not allowed.

    Example:
        >>> Penalty(rho=0.1, rho_growth=2.0).grown(0.1, n_updates=2)
        0.4
        >>> balancing = Penalty(rho=0.1, rho_growth=2.0, balance="network")
        >>> [balancing.balanced(0.1, primal, dual=1.0) for primal in (1.5, 0.5, 0.005)]
        [0.2, 0.1, 0.05]
    """

    rho: float = 1.0
    rho_growth: float = 1.15
    rho_max: float = 100.0
    relative: bool = True
    balance: Literal["none", "network", "weight"] = "none"

    def __post_init__(self) -> None:
        if not is_number(self.rho_max) or not 0 < self.rho_max < math.inf:
            raise refuse("rho_max", self.rho_max, "give a finite number > 0, such as 100.0")
        if not is_number(self.rho) or not 0 < self.rho <= self.rho_max:
            raise refuse("rho", self.rho, f"give a number with 0 < rho <= rho_max={self.rho_max!r}, such as 1.0")
        if not is_number(self.rho_growth) or not 1 <= self.rho_growth < math.inf:
            raise refuse("rho_growth", self.rho_growth, "give a finite factor >= 1, such as 1.15")
        if not isinstance(self.relative, bool):
            raise refuse("relative", self.relative, "give True or False")
        balance: object = self.balance  # a configuration file may have put anything there
        if not isinstance(balance, str) or balance not in ("none", "network", "weight"):
            raise refuse("balance", balance, "give 'none', 'network' or 'weight'")

    def grown(self, rho: float, n_updates: int = 1) -> float:
        """Return rho after so many updates."""
        return min(rho * self.rho_growth**n_updates, self.rho_max)

    def balanced(self, rho: float, primal: float, dual: float, n_updates: int = 1) -> float:
        """Return rho after so many updates that left these residuals.

        Args:
            rho: The penalty factor of the update.
            primal: ``|W - Z| / |W|``.
            dual: ``|Z - Z_old| / |W|``, without the factor rho.
            n_updates: For how many updates the one stands.
        """
        if primal > FAR * rho * dual:
            return self.grown(rho, n_updates)
        if rho * dual > FAR * primal:
            return rho / self.rho_growth**n_updates
        return min(rho, self.rho_max)
