"""How hard a training method pulls the weights towards their structure: the penalty factor rho and its growth."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_muws.training.checks import is_number, refuse


@dataclass(frozen=True)
class Penalty:
    """The penalty factor rho, and how it grows.

    In ADMM rho weighs the penalty ``rho / 2 * |W - Z + U|^2`` (Boyd et al. 2011, section 3.1.1). A growing rho is
    section 3.4.1 there, "Varying penalty parameter".

    Args:
        rho: Penalty factor at the start, in units of the loss per squared weight.
        rho_growth: Factor on rho after each update; an update that stands for several multiplies it as often.
        rho_max: Where rho stops growing.

    Raises:
        SettingError: A value has a wrong type or is not allowed.

    Example:
        >>> Penalty(rho=0.1, rho_growth=2.0).grown(0.1, n_updates=2)
        0.4
    """

    rho: float = 3e-3
    rho_growth: float = 1.15
    rho_max: float = 1.0

    def __post_init__(self) -> None:
        if not is_number(self.rho_max) or not 0 < self.rho_max < math.inf:
            raise refuse("rho_max", self.rho_max, "give a finite number > 0, such as 1.0")
        if not is_number(self.rho) or not 0 < self.rho <= self.rho_max:
            raise refuse("rho", self.rho, f"give a number with 0 < rho <= rho_max={self.rho_max!r}, such as 0.003")
        if not is_number(self.rho_growth) or not 1 <= self.rho_growth < math.inf:
            raise refuse("rho_growth", self.rho_growth, "give a finite factor >= 1, such as 1.15")

    def grown(self, rho: float, n_updates: int = 1) -> float:
        """Return rho after so many updates."""
        return min(rho * self.rho_growth**n_updates, self.rho_max)
