"""Several training methods, one after the other, as one method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_muws.structure.plan import PlanEntry
from lightning_muws.structure.support import Support
from lightning_muws.training.method import Method
from lightning_muws.training.penalty import Penalty
from lightning_muws.training.residuals import Residuals

Factory = Callable[[Mapping[str, PlanEntry], Penalty], Method]


class MethodSequence(Method):
    """Methods that share the time between ``admm_start`` and ``admm_end`` evenly; each begins where the last one ended.

    Args:
        factories: They make the methods, in the order of time.
        entries: The structure of each weight, by name: a plan's ``covered``.
        penalty: How hard each method pulls, at its start.
    """

    def __init__(self, factories: Sequence[Factory], entries: Mapping[str, PlanEntry], penalty: Penalty) -> None:
        self._factories, self._settings = tuple(factories), (entries, penalty)
        self._begin(0)

    def _begin(self, index: int) -> None:
        self._index, self._method = index, self._factories[index](*self._settings)

    @property
    def rho(self) -> float:  # type: ignore[override]
        """The penalty factor of the present method."""
        return self._method.rho

    def start(self, weights: Mapping[str, Tensor]) -> None:
        """Start the first method."""
        self._method.start(weights)

    def advance(self, weights: Mapping[str, Tensor], share: float) -> bool:
        """Go on to the method whose time it is; see :class:`Method`."""
        index = min(int(share * len(self._factories) + 1e-9), len(self._factories) - 1)
        if index <= self._index:
            return False
        self._method.finish(weights)
        self._begin(index)
        self._method.start(weights)
        return True

    def check(self, optimizers: Iterable[Optimizer]) -> None:
        """See :class:`Method`."""
        self._method.check(optimizers)

    def update(self, weights: Mapping[str, Tensor], due: int = 1) -> dict[str, Residuals]:
        """See :class:`Method`."""
        return self._method.update(weights, due)

    def before_step(self, weights: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """See :class:`Method`."""
        self._method.before_step(weights, scale)

    def after_step(self, weights: Mapping[str, Tensor]) -> None:
        """See :class:`Method`."""
        self._method.after_step(weights)

    def finish(self, weights: Mapping[str, Tensor]) -> None:
        """See :class:`Method`."""
        self._method.finish(weights)

    def choices(self) -> dict[str, tuple[Support, Tensor]]:
        """See :class:`Method`."""
        return self._method.choices()

    def metrics(self, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        """See :class:`Method`."""
        return self._method.metrics(weights)

    def state_dict(self) -> dict[str, Any]:
        """Return which method it is, and its state."""
        return {"index": self._index, "method": self._method.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Load what :meth:`state_dict` returned, onto the devices of these weights."""
        self._begin(state["index"])
        self._method.load_state_dict(state["method"], weights)
