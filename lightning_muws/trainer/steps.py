"""Optimizer steps that Lightning does not announce, and gradients that the module clips itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class StepWatch:
    """Call a function after each step of the followed optimizers, and detect weights that change without such a step.

    Lightning announces the steps that it knows. A module may also step a raw torch optimizer, or step each parameter in
    its backward pass. The version counters of tensors show such changes. They do not show a change through ``.data``,
    nor a step of a fused optimizer that is not followed.

    Args:
        after: Called with an optimizer that has stepped; returns the weights it owns, by name.
    """

    def __init__(self, after: Callable[[Optimizer], Mapping[str, Tensor]]) -> None:
        self._after = after
        self._hooks: dict[int, tuple[Optimizer, RemovableHandle]] = {}
        self._versions: dict[str, int] = {}
        self._announced: set[int] = set()
        self._known: set[str] = set()
        self._past: set[str] = set()

    def follow(self, optimizers: Iterable[Optimizer]) -> None:
        """Follow these optimizers only: a reference to an old one would keep its moments in memory."""
        now = {id(optimizer): optimizer for optimizer in optimizers}
        for key in set(self._hooks) - set(now):
            self._hooks.pop(key)[1].remove()
        for optimizer in now.values():
            self._hook(optimizer)

    def _hook(self, optimizer: Optimizer) -> None:
        # An optimizer that never called Optimizer.__init__ has no hooks: enforce its weights at the end of the batch.
        if id(optimizer) not in self._hooks and hasattr(optimizer, "_optimizer_step_post_hooks"):
            self._hooks[id(optimizer)] = optimizer, optimizer.register_step_post_hook(self._saw)

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Begin a batch."""
        self._announced, self._known, self._past = set(), set(), set()
        self._versions = {name: weight._version for name, weight in weights.items()}

    def announce(self, optimizer: Optimizer, names: Iterable[str]) -> None:
        """Expect a step of an optimizer that owns the weights of these names; it may be new in this batch."""
        self._hook(optimizer)
        self._announced.add(id(optimizer))
        self._known.update(names)

    def _saw(self, optimizer: Optimizer, *_: object) -> None:
        owned = self._after(optimizer)
        self._versions |= {name: weight._version for name, weight in owned.items()}
        if id(optimizer) not in self._announced:
            self._past.update(owned)
        self._announced.discard(id(optimizer))

    def end(self, weights: Mapping[str, Tensor]) -> tuple[set[str], set[str]]:
        """End a batch.

        Returns:
            The names of the weights that changed after the last step seen, and of those that changed in this batch
            without an announced step.
        """
        changed = {name for name, version in self._versions.items() if weights[name]._version != version}
        return changed, self._past | (changed - self._known)

    def remove(self) -> None:
        """Follow no optimizer."""
        self.follow(())


def unannounced(names: Iterable[str], phase: str) -> str:
    """Return a warning about weights that changed without an announced step."""
    follows = "no penalty pulls them towards their structure"
    if phase == "retraining":
        follows = "they stay inside their structure, but their gradients and moments are not projected"
    return (
        f"{', '.join(sorted(names)[:5])} changed in training without a step that Lightning announces, so "
        f"{follows}; step the optimizers that self.optimizers() returns, not those inside them"
    )


class ClipWatch:
    """Call a function before a module's ``clip_gradients``, and remember for which optimizers.

    It replaces the method on the instance until :meth:`remove`. It does not see calls of torch's own clipping
    functions: with those, the penalty is added after the clip.

    Args:
        module: A LightningModule in manual optimization.
        before: Called with the optimizer whose gradients are about to be clipped.
    """

    def __init__(self, module: Any, before: Callable[[Optimizer], None]) -> None:
        self._module, self._before, self._done = module, before, set[int]()
        self._clip = module.clip_gradients
        module.clip_gradients = self._clip_gradients

    def _clip_gradients(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        inner = getattr(optimizer, "optimizer", optimizer)  # Lightning hands out wrapped optimizers
        if id(inner) not in self._done:
            self._done.add(id(inner))
            self._before(inner)
        return self._clip(optimizer, *args, **kwargs)

    def was_before(self, optimizer: Optimizer) -> bool:
        """Return whether ``before`` was called for this step of the optimizer, and forget it."""
        found = id(optimizer) in self._done
        self._done.discard(id(optimizer))
        return found

    def remove(self) -> None:
        """Restore the method of the module."""
        self._module.__dict__.pop("clip_gradients", None)
