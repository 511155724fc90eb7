"""Optimizer steps that Lightning does not announce, and clipping by the module itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class StepWatch:
    """Calls ``after`` behind each step of the optimizers it follows, and finds what was changed past them.

    A step is announced by Lightning, or not: a module may step a raw torch optimizer, or one parameter after the other
    in its backward pass. A change through ``.data``, or by a fused optimizer that is not followed, cannot be seen.

    Args:
        after: What to do with an optimizer that has stepped; returns the weights it owns, by name.
    """

    def __init__(self, after: Callable[[Optimizer], Mapping[str, Tensor]]) -> None:
        self._after = after
        self._hooks: dict[int, tuple[Optimizer, RemovableHandle]] = {}
        self._versions: dict[str, int] = {}
        self._announced: set[int] = set()
        self._known: set[str] = set()
        self._past: set[str] = set()

    def follow(self, optimizers: Iterable[Optimizer]) -> None:
        """Follow these optimizers, and let go of others, whose moments would be kept alive for nothing."""
        now = {id(optimizer): optimizer for optimizer in optimizers}
        for key in set(self._hooks) - set(now):
            self._hooks.pop(key)[1].remove()
        for optimizer in now.values():
            self._hook(optimizer)

    def _hook(self, optimizer: Optimizer) -> None:
        # One that never called Optimizer.__init__ calls no hooks: its weights are held when the batch ends.
        if id(optimizer) not in self._hooks and hasattr(optimizer, "_optimizer_step_post_hooks"):
            self._hooks[id(optimizer)] = optimizer, optimizer.register_step_post_hook(self._saw)

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Begin a batch."""
        self._announced, self._known, self._past = set(), set(), set()
        self._versions = {name: weight._version for name, weight in weights.items()}

    def announce(self, optimizer: Optimizer, names: Iterable[str]) -> None:
        """Expect a step of an optimizer, perhaps made within this batch, that owns the weights of these names."""
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
            The names of the weights that changed after all steps that were seen, and of those that changed in a batch
            without an announced step of theirs.
        """
        changed = {name for name, version in self._versions.items() if weights[name]._version != version}
        return changed, self._past | (changed - self._known)

    def remove(self) -> None:
        """Follow no optimizer any more."""
        self.follow(())


def unannounced(names: Iterable[str], phase: str) -> str:
    """Return a warning on weights that were changed past all announced steps."""
    follows = "no penalty pulls them towards their structure"
    if phase == "retraining":
        follows = "they are held to their structure, but their gradients and moments are not"
    return (
        f"{', '.join(sorted(names)[:5])} changed in training without a step that Lightning announces, so "
        f"{follows}; step the optimizers that self.optimizers() returns, not those inside them"
    )


class ClipWatch:
    """Calls ``before`` ahead of a module's own ``clip_gradients``, and remembers for which optimizers it did.

    It sits on the instance, as an attribute, and is gone after :meth:`remove`. A module that calls torch's own clipping
    functions cannot be seen: there the penalty comes after the clip.

    Args:
        module: A LightningModule in manual optimization.
        before: What to do with the optimizer whose gradients will be clipped.
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
        """Return whether the gradients of this step were handled ahead of a clip, and forget it."""
        found = id(optimizer) in self._done
        self._done.discard(id(optimizer))
        return found

    def remove(self) -> None:
        """Give the module its own method back."""
        self._module.__dict__.pop("clip_gradients", None)
