"""Runs a model on the example, and records the inputs of each module. Takes any nesting of inputs and outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from lightning_muws.errors import SettingError
from lightning_muws.runtime.kernels.reference import relative_error

FAILURES = (
    AttributeError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)  # what a module may raise that stands in another's place
MAX_SHAPES = 4  # input shapes of a layer that are timed


@dataclass(frozen=True)
class Example:
    """One input of a model: positional and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, example_input: object) -> Example:
        """Return a tensor as one argument, a tuple or list as several, a mapping as keyword arguments.

        Raises:
            SettingError: It has no tensor.
        """
        if isinstance(example_input, Mapping):
            example = cls((), dict(example_input))
        else:
            example = cls(tuple(example_input) if isinstance(example_input, (tuple, list)) else (example_input,), {})
        if not example.tensors:
            raise SettingError(
                f"example_input is a {type(example_input).__name__} without tensors: give a tensor, or a tuple (or "
                "dict) of the arguments that the model's forward takes"
            )
        return example

    @property
    def tensors(self) -> list[Tensor]:
        """All its tensors."""
        return tensors_in((self.args, dict(self.kwargs)))

    def map(self, change: Callable[[Tensor], Tensor]) -> Example:
        """Return the example with each tensor changed."""
        args, kwargs = pytree.tree_map_only(Tensor, change, (self.args, dict(self.kwargs)))
        return Example(args, kwargs)

    def __call__(self, model: Callable[..., Any]) -> Any:
        """Return the model's output."""
        return model(*self.args, **self.kwargs)


class Root(nn.Module):
    """Holds the model, so that a model that is a single layer can be swapped like any other."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns."""
        return self.model(*args, **kwargs)


def tensors_in(value: object) -> list[Tensor]:
    """Return all tensors of nested tuples, lists and dicts, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def output_error(output: object, expected: list[Tensor]) -> float:
    """Return the largest relative error of the output's tensors; inf if their number or shapes differ."""
    found = tensors_in(output)
    if len(found) != len(expected) or any(a.shape != b.shape for a, b in zip(found, expected, strict=True)):
        return float("inf")
    errors = [relative_error(a, b.double()) for a, b in zip(found, expected, strict=True)]
    return max((e if e == e else float("inf") for e in errors), default=0.0)


@dataclass
class Calls:
    """How one forward of the example called a module.

    Attributes:
        n: The number of calls.
        inputs: One input of each shape, :data:`MAX_SHAPES` at most.
        takes_one: Whether it takes one tensor, and was called with nothing else.
    """

    n: int = 0
    inputs: list[Tensor] = field(default_factory=list)
    takes_one: bool = True


def observe(model: nn.Module, example: Example) -> dict[nn.Module, Calls]:
    """Run the example, and return the calls of each module.

    It uses global hooks, because a hook on a module changes the way that the module is called.
    """
    inside = set(model.modules())
    calls: dict[nn.Module, Calls] = {}

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module not in inside:
            return
        seen = calls.setdefault(module, Calls())
        seen.n += 1
        if len(args) != 1 or not isinstance(args[0], Tensor):
            seen.takes_one = False
        elif len(seen.inputs) < MAX_SHAPES and all(args[0].shape != x.shape for x in seen.inputs):
            seen.inputs.append(args[0].detach())

    handle = register_module_forward_pre_hook(before)
    try:
        example(model)
    finally:
        handle.remove()
    for module, seen in calls.items():
        seen.takes_one = seen.takes_one and _takes_one(module)
    return calls


def _takes_one(module: nn.Module) -> bool:
    """Return whether ``forward`` has exactly one argument; one with a default counts too."""
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.kind for p in parameters] == [inspect.Parameter.POSITIONAL_OR_KEYWORD]


def has_hooks(module: nn.Module) -> bool:
    """Return whether a call runs more than the class's forward: hooks, or a replaced ``forward``."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in names) or "forward" in vars(module)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in every place where ``old`` is registered."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


@contextmanager
def inference() -> Iterator[None]:
    """Run without gradients but with ordinary tensors, which can be used and saved anywhere."""
    with torch.inference_mode(False), torch.no_grad():
        yield
