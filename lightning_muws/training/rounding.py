"""Retraining on the values that the file will hold: weights rounded to steps, with their exact values kept beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_muws.errors import StateError
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.sharded import apply_, like, local, whole
from lightning_muws.structure.support import Support
from lightning_muws.training.record import on_device

Stepper = Callable[[Mapping[str, BlockGrid], float], Mapping[str, float]]
"""Returns the step of each parameter, by name, with which a file of the module is so many times smaller."""


class Rounding:
    """Holds parameters at whole multiples of their steps while an optimizer trains them.

    Each parameter has an exact value beside it. The network computes with the rounded value; what a step of the
    optimizer adds to that goes to the exact value, which is then rounded again. So gradients pass the rounding as if it
    were not there (the straight-through estimator, Bengio, Leonard and Courville 2013, arXiv:1308.3432), and small
    updates add up until the rounded value moves. A parameter that nothing changed keeps every bit.

    Args:
        supports: The supports of weights that have a structure, by name; of a sharded weight this rank's part. Unified
            blocks of one magnitude stay so.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([0.3, -0.9]))
        >>> rounding = Rounding({})
        >>> rounding.start({"w": w}, {"w": 0.5})
        >>> w.tolist()
        [0.5, -1.0]
        >>> for _ in range(2):
        ...     w.data -= 0.1
        ...     rounding.after_step({"w": w})
        >>> w.tolist()  # 0.3 became 0.1, and -0.9 became -1.1
        [0.0, -1.0]
    """

    def __init__(self, supports: Mapping[str, Support]) -> None:
        self.supports = dict(supports)
        self.steps: dict[str, float] = {}
        self._exact: dict[str, Tensor] = {}

    @torch.no_grad()
    def start(self, parameters: Mapping[str, Tensor], steps: Mapping[str, float]) -> None:
        """Begin to round these parameters, or go on with other steps; in place.

        Args:
            parameters: By name; those without a step are left as they are.
            steps: The steps, by name: positive, exact in float32.
        """
        self.restore(parameters)
        self.steps = {name: step for name, step in steps.items() if name in parameters}
        self._exact = {name: _exact(parameters[name]) for name in self.steps}
        for name in self.steps:
            self._show(name, parameters[name])

    @torch.no_grad()
    def restore(self, parameters: Mapping[str, Tensor]) -> None:
        """Write the exact values into the parameters that are rounded, until the next :meth:`start`."""
        for name, exact in self._exact.items():
            local(parameters[name]).copy_(local(exact))
        self.steps, self._exact = {}, {}

    @torch.no_grad()
    def after_step(self, parameters: Mapping[str, Tensor]) -> None:
        """Move what an optimizer's step added to these parameters to their exact values, and round again, in place.

        Args:
            parameters: Some of the parameters, by name.
        """
        for name, parameter in parameters.items():
            if name in self._exact:
                exact, added = self._exact[name], _exact(parameter)
                local(exact).add_(local(added).sub_(local(self._rounded(name, parameter))))
                if name in self.supports:
                    apply_(exact, self.supports[name], Support.tie_)
                self._show(name, parameter)

    def _show(self, name: str, parameter: Tensor) -> None:
        local(parameter.detach()).copy_(local(self._rounded(name, parameter)))

    def _rounded(self, name: str, parameter: Tensor) -> Tensor:
        """Return the rounded value of a parameter, as precisely as the parameter's dtype holds it."""
        found, step = self._exact[name].clone(), self.steps[name]
        if name in self.supports:
            apply_(found, self.supports[name], lambda support, x: support.round_(x, step))
        else:
            local(found).div_(step).round_().mul_(step).add_(0.0)
        return found.to(parameter.dtype).to(found.dtype)

    @torch.no_grad()
    def verify(self, parameters: Mapping[str, Tensor]) -> None:
        """Check that each of these parameters that is rounded has its rounded value, with ``==``.

        Raises:
            StateError: One has not; the message has its name.
        """
        for name in self._exact:
            parameter = parameters[name]
            if not torch.equal(local(self._rounded(name, parameter)).to(parameter.dtype), local(parameter.detach())):
                raise StateError(
                    f"{name} is not what the file would hold, whole multiples of {self.steps[name]:.3g}: something "
                    "changed it after the optimizer's step; remove that, or let the callback come after it"
                )

    def follow(self, parameters: Mapping[str, Tensor], supports: Mapping[str, Support]) -> None:
        """Move to the devices of these parameters, after a Trainer moved them."""
        self.supports = dict(supports)
        self._exact = {name: exact.to(parameters[name].device) for name, exact in self._exact.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the steps and the exact values, as floats and tensors; a collective where these are sharded."""
        return {"steps": dict(self.steps), "exact": {name: whole(x) for name, x in self._exact.items()}}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Load what :meth:`state_dict` returned, onto the devices of these parameters."""
        self.steps = dict(state["steps"])
        self._exact = {}
        for name, saved in state["exact"].items():
            parameter = parameters[name]
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            self._exact[name] = like(on_device({"exact": saved}, parameter, dtype)["exact"], parameter)


def _exact(parameter: Tensor) -> Tensor:
    """Return a copy of a parameter in float32, or float64 if it has that."""
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
