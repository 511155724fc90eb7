"""Which values of a program are views of others, and where they have to be copied into order. Pure functions.

A view has the numbers of another value under other indices, as in torch: ``flatten``, ``unflatten``, ``permute``,
``transpose``, ``select``, ``chunk``, ``reshape``. It costs nothing for a step that reads it with its strides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_muws.errors import StateError
from lightning_muws.runtime.native.steps import Call, Norm, Shape, Simple, Sparse

SIZE = 4  # numbers of `reshape` for each dimension


def target(numbers: Sequence[int], shapes: Sequence[Shape]) -> Shape:
    """Return the sizes that ``reshape`` makes.

    Args:
        numbers: Four for each dimension. ``(i, d, m, n)`` is the size of dimension ``d`` of input ``i`` times ``m``,
            divided by ``n``, rounded down. ``(-1, 0, m, 1)`` is the number ``m``: -1 for what is left.
        shapes: Of the inputs.

    Example:
        >>> target((0, 0, 1, 1, -1, 0, 3, 1, 1, 2, 1, 3), [(5, 12), (5, 2, 12)])
        (5, 3, 4)
    """
    dims = [numbers[at : at + SIZE] for at in range(0, len(numbers), SIZE)]
    return tuple(m if i < 0 else shapes[i][d] * m // n for i, d, m, n in dims)


VIEWS: Mapping[str, Callable[[Tensor, Sequence[int], Sequence[Shape]], Tensor]] = {
    "flatten": lambda x, n, shapes: x.view(_flat(x.shape, *n)),
    "unflatten": lambda x, n, shapes: torch.unflatten(x, n[0], n[1:]),
    "permute": lambda x, n, shapes: x.permute(*n),
    "transpose": lambda x, n, shapes: x.transpose(*n),
    "select": lambda x, n, shapes: x.select(*n),
    "chunk": lambda x, n, shapes: x.chunk(n[0], n[1])[n[2]],
    "reshape": lambda x, n, shapes: x.view(target(n, shapes)),
    "contiguous": lambda x, n, shapes: x,
}
"""What torch does for each kind of view: of a tensor, the step's numbers, and the shapes of all inputs."""


def _flat(shape: Sequence[int], first: int, last: int) -> torch.Size:
    return torch.empty(shape, device="meta").flatten(first, last).shape


def is_view(call: Call) -> bool:
    """Return whether a step computes nothing."""
    return isinstance(call.operation, Simple) and call.operation.kind in VIEWS


class Layout(NamedTuple):
    """Where the numbers of a value lie.

    Attributes:
        root: The value whose memory it has: itself, or the one that it is a view of.
        shape: Of the value.
        strides: Distances of neighbours along each dimension.
        at: The first number.
        is_plain: Whether it has all numbers of the root, in order.
    """

    root: int
    shape: Shape
    strides: tuple[int, ...]
    at: int
    is_plain: bool


class Ordered(NamedTuple):
    """Steps whose inputs lie as they read them.

    Attributes:
        calls: The steps, with the copies that are needed.
        layouts: Of each value.
        outputs: The values to return; each has memory of its own.
    """

    calls: list[Call]
    layouts: list[Layout]
    outputs: list[int]


def ordered(calls: Sequence[Call], shapes: Sequence[Shape], outputs: Sequence[int]) -> Ordered:
    """Return the steps with copies where a step, or who gets an output, needs numbers in order.

    Raises:
        StateError: A step does not fit the shapes.
    """
    order = _Order(shapes)
    try:
        for call in calls:
            order.add(call)
    except (RuntimeError, IndexError, ValueError) as error:  # torch refuses a view
        raise StateError(f"a step of a program does not fit the shapes {list(shapes)}: {error}") from error
    taken = set(range(len(shapes)))
    made: list[int] = []
    for value in map(order.numbers.__getitem__, outputs):
        plain = order.plain(value)
        made.append(order.copy(value) if order.layouts[plain].root in taken else plain)
        taken.add(order.layouts[made[-1]].root)
    if any(0 in layout.shape for layout in order.layouts):
        raise StateError(f"a program takes no value without numbers, as it has for the shapes {list(shapes)}")
    return Ordered(order.calls, order.layouts, made)


class _Order:
    """Steps that are taken one by one."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.n_inputs = len(shapes)
        self.calls: list[Call] = []
        self.layouts = [self._own(i, shape) for i, shape in enumerate(shapes)]
        self.numbers = list(range(len(shapes)))  # of the given steps' values, after copies
        self.copies: dict[int, int] = {}

    def add(self, call: Call) -> None:
        """Take a step whose inputs have the given numbers."""
        inputs = tuple(self.numbers[i] for i in call.inputs)
        if is_view(call):
            self.numbers.append(self._view(call, inputs))
        elif isinstance(call.operation, Simple) and call.operation.kind == "attention":
            self.numbers.append(self._attention(call.operation, inputs))
        else:
            self.numbers.append(self._made(call.operation, tuple(map(self.plain, inputs))))

    def plain(self, value: int) -> int:
        """Return the value, or a copy of it, whose numbers lie in order."""
        if self.layouts[value].is_plain:
            return value
        if value not in self.copies:
            self.copies[value] = self.copy(value)
        return self.copies[value]

    def copy(self, value: int) -> int:
        """Return a copy whose numbers lie in order."""
        return self._made(Simple("copy"), (value,))

    def _made(self, operation: Sparse | Simple | Norm, inputs: tuple[int, ...], layout: Layout | None = None) -> int:
        shapes = [self.layouts[i].shape for i in inputs]
        made = self.n_inputs + len(self.calls)
        self.calls.append(Call(operation, inputs))
        self.layouts.append(self._own(made, operation.shape(shapes)) if layout is None else layout)
        return made

    def _view(self, call: Call, inputs: tuple[int, ...]) -> int:
        layouts = [self.layouts[i] for i in inputs]
        try:
            layout = self._viewed(call.operation, layouts)
        except RuntimeError:  # no strides make this view
            value = self.plain(inputs[0])
            layout = self._viewed(call.operation, [self.layouts[value], *layouts[1:]])
            inputs = value, *inputs[1:]
        return self._made(call.operation, inputs, layout)

    def _viewed(self, operation: object, layouts: Sequence[Layout]) -> Layout:
        assert isinstance(operation, Simple)  # noqa: S101  for mypy
        of = layouts[0]
        n = math.prod(self.layouts[of.root].shape)
        numbers = torch.empty(n, device="meta").as_strided(of.shape, of.strides, of.at)
        view = VIEWS[operation.kind](numbers, operation.numbers, [layout.shape for layout in layouts])
        at, is_plain = int(view.storage_offset()), view.is_contiguous() and view.numel() == n
        return Layout(of.root, tuple(view.shape), view.stride(), at, is_plain and at == 0)

    def _attention(self, operation: Simple, inputs: tuple[int, ...]) -> int:
        """Take attention: it reads any strides but of the last dimension, and makes ``(n, t, heads, w)``."""
        rows = tuple(i if self.layouts[i].strides[-1] == 1 else self.plain(i) for i in inputs)
        n, heads, t, w = operation.shape([self.layouts[i].shape for i in rows])
        strides, made = (t * heads * w, w, heads * w, 1), self.n_inputs + len(self.calls)
        is_plain = heads == 1 or t == 1
        return self._made(operation, rows, Layout(made, (n, heads, t, w), strides, 0, is_plain))

    @staticmethod
    def _own(value: int, shape: Shape) -> Layout:
        strides = torch.empty(shape, device="meta").stride()
        return Layout(value, tuple(shape), strides, 0, True)
