"""Runs a program for a part of its batch at a time, so that what passes between steps stays in a core's caches.

That is possible if no step mixes samples. It pays for Linear layers over sequences: between two of them lie more
numbers than the second-level cache holds. Convolutions cut their batch themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_muws.errors import StateError
from lightning_muws.runtime.native.program import Program
from lightning_muws.runtime.native.steps import Call, Shape, Simple, Sparse
from lightning_muws.runtime.native.views import SIZE, Ordered, is_view, ordered

PART_BYTES = 1 << 19  # of the arena, for each thread
FEWEST_ROWS = 64  # of a Linear in a part: each part reads all weights again


class Parts:
    """A program for a batch, as programs for parts of it.

    Args:
        programs: A program, and how many samples it is for, in the order of the batch.
        shapes: Of the inputs, with the whole batch.
        output_shapes: Of the outputs, with the whole batch.
    """

    def __init__(
        self, programs: Sequence[tuple[Program, int]], shapes: Sequence[Shape], output_shapes: Sequence[Shape]
    ) -> None:
        self.programs, self.output_shapes = tuple(programs), list(output_shapes)
        self.sample_bytes = [4 * math.prod(shape[1:]) for shape in (*shapes, *output_shapes)]
        self.n_bytes = max(program.n_bytes for program, _ in programs)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the outputs for contiguous float32 inputs; None if NaN or infinity was to be rounded to a byte."""
        outputs = [torch.empty(shape) for shape in self.output_shapes]
        pointers = [tensor.data_ptr() for tensor in (*inputs, *outputs)]
        for program, n in self.programs:
            if not program.run(pointers):
                return None
            pointers = [p + n * size for p, size in zip(pointers, self.sample_bytes, strict=True)]
        return outputs

    def is_current(self) -> bool:
        """Return whether layers that read the same bytes still round alike."""
        return all(program.is_current() for program in {id(p): p for p, _ in self.programs}.values())


def prepared(calls: Sequence[Call], shapes: Sequence[Shape], outputs: Sequence[int]) -> Program | Parts:
    """Return the steps prepared for inputs of these shapes, for the whole batch or for parts of it.

    Raises:
        StateError: The kernels are not installed, or a step does not fit the shapes.
    """
    whole = Program(calls, shapes, outputs)
    if not all(shapes):  # a number has no batch
        return whole
    order, n = ordered(calls, shapes, outputs), shapes[0][0]
    if not is_by_sample(order, len(shapes)):
        return whole
    rows = min((_rows(order, call) for call in order.calls if isinstance(call.operation, Sparse)), default=0)
    n_parts = min(whole.n_bytes // (PART_BYTES * torch.get_num_threads()), n * rows // FEWEST_ROWS, n)
    if n_parts < 2:
        return whole
    ends = [n * (i + 1) // n_parts for i in range(n_parts)]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]  # at most two sizes
    try:
        made = {size: Program(calls, [(size, *shape[1:]) for shape in shapes], outputs) for size in set(sizes)}
    except StateError:  # a view fits the whole batch alone
        return whole
    return Parts([(made[size], size) for size in sizes], shapes, whole.output_shapes)


def _rows(order: Ordered, call: Call) -> int:
    """Return the rows of a sample that a Linear takes."""
    return math.prod(order.layouts[call.inputs[0]].shape[1:-1])


def is_by_sample(order: Ordered, n_inputs: int) -> bool:
    """Return whether layers are Linear and each output along dimension 0 depends on one sample of each input."""
    n = order.layouts[0].shape[0]
    axes = [0] * n_inputs  # of each value, the dimension that runs over samples
    if any(layout.shape[:1] != (n,) for layout in order.layouts[:n_inputs]):
        return False
    for call in order.calls:
        ranks = [len(order.layouts[i].shape) for i in call.inputs]
        axis: int | None = 0
        if is_view(call):
            axis = _axis_of_view(call, axes, ranks)
        elif any(axes[i] for i in call.inputs) or min(ranks) < 2:  # a row needs another dimension
            axis = None
        if axis is None or (isinstance(call.operation, Sparse) and call.operation.n_dims != 1):
            return False
        axes.append(axis)
    return all(axes[value] == 0 and order.layouts[value].shape[0] == n for value in order.outputs)


def _axis_of_view(call: Call, axes: Sequence[int], ranks: Sequence[int]) -> int | None:
    """Return the dimension of a view that runs over samples, or None if there is none."""
    assert isinstance(call.operation, Simple)  # noqa: S101  for mypy
    kind, numbers, axis = call.operation.kind, call.operation.numbers, axes[call.inputs[0]]
    if kind == "reshape":
        return _axis_of_sizes(numbers, [axes[i] for i in call.inputs], ranks)
    dims = [d % ranks[0] for d in numbers]
    if kind == "permute":
        return dims.index(axis)
    if kind == "transpose":
        return {dims[0]: dims[1], dims[1]: dims[0]}.get(axis, axis)
    if kind == "flatten":
        first, last = dims
        inside = first <= axis <= last and first != last
        return None if inside else axis - (last - first if last < axis else 0)
    if kind == "contiguous":
        return axis
    dim = dims[1] if kind == "chunk" else dims[0]
    grows = {"select": -1, "unflatten": len(numbers) - 2}.get(kind, 0)
    return None if dim == axis else axis + (grows if dim < axis else 0)


def _axis_of_sizes(numbers: Sequence[int], axes: Sequence[int], ranks: Sequence[int]) -> int | None:
    """Return 0 if ``reshape`` keeps dimension 0 as it is, and no other size depends on it."""
    given = [numbers[at : at + SIZE] for at in range(0, len(numbers), SIZE)]
    sizes = [(i, d if i < 0 else d % ranks[i], m, n) for i, d, m, n in given]
    of_samples = [(i, axis, 1, 1) for i, axis in enumerate(axes)]
    keeps = axes[0] == 0 and sizes[0] in of_samples
    return 0 if keeps and all(i < 0 or d != axes[i] for i, d, *_ in sizes[1:]) else None
