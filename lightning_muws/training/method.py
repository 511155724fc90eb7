"""What a training method is: it brings weights near their structure, before the structure is frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_muws.structure.support import Support
from lightning_muws.training.residuals import Residuals


class Method(Protocol):
    """A training method. :class:`~lightning_muws.training.run.CompressionRun` calls it and knows nothing else of it.

    The run calls :meth:`start` once, :meth:`before_step` and :meth:`after_step` around each optimizer step, and
    :meth:`update` at the times of :class:`~lightning_muws.Phases`. At the end it calls :meth:`finish`, and freezes the
    structure without the method.

    A new method is a class with a ``start`` and an ``update``, and one row in
    :data:`lightning_muws.training.methods.METHODS`. A class that inherits from this one gets the other methods. Where
    weights are sharded (DTensor), every rank makes the same calls.

    Args:
        rho: How hard the method pulls now, in the units of :class:`~lightning_muws.Penalty`.
        ignored: The settings of a penalty that the method does not use; they must have their defaults.
    """

    rho: float
    ignored: ClassVar[frozenset[str]] = frozenset()

    def start(self, weights: Mapping[str, Tensor]) -> None:
        """Begin with these weights, by name: all that the plan covers.

        Raises:
            StateError: A weight has NaN or Inf.
        """
        ...

    def update(self, weights: Mapping[str, Tensor], due: int = 1) -> dict[str, Residuals]:
        """Do what is due between two optimizer steps.

        Args:
            weights: All covered weights, by name.
            due: For how many updates this one stands: more than 1 where batches are rarer than updates.

        Returns:
            The residuals of each weight.

        Raises:
            StateError: A weight has NaN or Inf.
        """
        ...

    def before_step(self, weights: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Change the gradients of weights that an optimizer is about to step.

        Args:
            weights: Some of the covered weights, by name.
            scale: Factor on whatever is added to the gradients, which are a multiple of the loss's by this factor. It
                is negative where the optimizer maximizes.
        """

    def after_step(self, weights: Mapping[str, Tensor]) -> None:
        """Change weights that an optimizer has just stepped, in place."""

    def advance(self, weights: Mapping[str, Tensor], share: float) -> bool:
        """Take note of the time; return whether the method began something new, which stands for an update.

        Args:
            weights: All covered weights, by name.
            share: Of the time between the method's start and its end, which part is over.
        """
        return False

    def check(self, optimizers: Iterable[Optimizer]) -> None:
        """Check that the method works with these optimizers.

        Raises:
            SettingError: It does not.
        """

    def finish(self, weights: Mapping[str, Tensor]) -> None:
        """End the method: write into the weights, in place, what the structure is to be chosen from."""

    def choices(self) -> dict[str, tuple[Support, Tensor]]:
        """Return this rank's choice of blocks and magnitudes, by name; equal on all ranks, or empty."""
        return {}

    def metrics(self, weights: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
        """Return what else to log beside rho and the residuals, by name: numbers or scalar tensors."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed method needs, as plain dicts, lists, strings, numbers and tensors."""
        return {"rho": self.rho}

    def load_state_dict(self, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Load a state, in the place of :meth:`start`, onto the devices of these weights.

        The run has checked that the state is of the same method, and of weights with the same shapes and structures.
        """
        self.rho = state["rho"]


def exact_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which methods compute with a weight: float32 for half precision."""
    return torch.promote_types(weight.dtype, torch.float32)
