"""Runs layers and the steps between them as one native program over one arena, for inputs of one shape.

The output of a layer of 8 bits goes to the next such layer as bytes, rounded as that layer would round it. So a program
computes exactly what its layers compute one by one.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_muws.errors import StateError
from lightning_muws.runtime.native.arena import Life, place
from lightning_muws.runtime.native.library import Step, handle, level
from lightning_muws.runtime.native.plan import Blocks, Geometry, Plan
from lightning_muws.runtime.native.plan8 import Blocks8, Geometry8, layer8

INT8, PLAN, GEMV, ADD, RELU, MEAN = range(6)  # STEP_* of api.h
OUTSIDE = 1 << 48  # PLACE_OUTSIDE of api.h
NONE = -1
ARENAS = 4  # kept between calls: so many threads call at once without a new one

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sparse:
    """A Linear ``(..., in)``, a Conv1d ``(n, c, w)`` or a Conv2d ``(n, c, h, w)`` by packed blocks.

    ReLU ends it if the geometry says so. A second input is added before.

    Args:
        blocks: The packed blocks: :class:`Blocks8` are of 8 bits.
        geometry: What the layer computes.
        n_dims: Dimensions of the input beside the batch: 1, 2 or 3.
        n_in: Numbers of a sample, or channels of an image, that the blocks are for.
    """

    blocks: Blocks | Blocks8
    geometry: Geometry | Geometry8
    n_dims: int
    n_in: int

    def images(self, shape: Shape) -> Shape:
        """Return the shape of an input as the kernels see it, ``(n, c, h, w)``."""
        if self.n_dims == 1:
            return math.prod(shape[:-1]), shape[-1], 1, 1
        return shape if self.n_dims == 3 else (*shape[:2], 1, shape[2])

    def shape(self, shape: Shape) -> Shape:
        """Return the shape of the output."""
        g = self.geometry
        if self.n_dims == 1:
            return *shape[:-1], g.out
        n, _, h, w = self.images(shape)
        out = g.out_shape((n, 0, h, w)) if isinstance(g, Geometry8) else g.out_shape(n, h, w)
        return tuple(out) if self.n_dims == 3 else (out[0], out[1], out[3])

    @property
    def takes_bytes(self) -> bool:
        """Whether its input may be rounded before it runs."""
        return isinstance(self.geometry, Geometry8) and not self.geometry.dynamic


@dataclass(frozen=True)
class Simple:
    """A step without weights.

    Args:
        kind: ``add`` (two inputs of one shape), ``relu``, ``mean`` (of each channel: ``(n, c, h, w)`` to
            ``(n, c, 1, 1)``) or ``flatten`` (from dimension 1 on; nothing is computed).
    """

    kind: str

    def shape(self, shape: Shape) -> Shape:
        """Return the shape of the output."""
        if self.kind == "mean":
            return *shape[:2], 1, 1
        return (shape[0], math.prod(shape[1:])) if self.kind == "flatten" else shape


@dataclass(frozen=True)
class Call:
    """One step: an operation on values. The inputs of the program are values 0, 1, ...; each step makes the next.

    Args:
        operation: What it computes.
        inputs: Numbers of the values that it reads.
    """

    operation: Sparse | Simple
    inputs: tuple[int, ...]


class Program:
    """Steps prepared for inputs of one shape.

    Args:
        calls: The steps, in order.
        shapes: Shapes of the inputs.
        outputs: Numbers of the values to return.

    Raises:
        StateError: The kernels are not installed, or a step does not fit the shapes.
    """

    def __init__(self, calls: Sequence[Call], shapes: Sequence[Shape], outputs: Sequence[int]) -> None:
        name = level()
        if name is None:
            raise StateError(
                "a program needs the native kernels, which are not installed here: call accelerate() again"
            )
        self.found, self.level = handle(name)
        values = _Values(calls, shapes, outputs)
        self.output_shapes = [values.shapes[i] for i in outputs]
        self.kept: list[object] = [calls]  # the steps point into them
        steps = [step for i in range(len(calls)) for step in self._steps(values, i)]
        self.steps = (Step * len(steps))(*steps)
        self.n_bytes = values.n_bytes
        self.alike = values.alike
        self.outside = ctypes.c_void_p * (len(shapes) + len(outputs))
        self.arenas: list[Tensor] = []

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the outputs for contiguous float32 inputs; None if NaN or infinity was to be rounded to a byte."""
        try:
            arena = self.arenas.pop()  # no other call has it
        except IndexError:
            arena = torch.empty(self.n_bytes, dtype=torch.uint8)
        outputs = [torch.empty(shape) for shape in self.output_shapes]
        outside = self.outside(*(x.data_ptr() for x in inputs), *(y.data_ptr() for y in outputs))
        broken = self.found.muws_program(
            self.level, self.steps, len(self.steps), arena.data_ptr(), outside, torch.get_num_threads()
        )
        if len(self.arenas) < ARENAS:
            self.arenas.append(arena)
        return None if broken else outputs

    def is_current(self) -> bool:
        """Return whether layers that read the same bytes still round alike: other weights may have been loaded."""
        return all(one.tolist() == other.tolist() for one, other in self.alike)

    def _steps(self, values: _Values, i: int) -> list[Step]:
        """Return step ``i`` as the kernels take it, in one or two parts."""
        call, made = values.calls[i], values.made(i)
        operation = call.operation
        if isinstance(operation, Sparse):
            given, wanted = operation.images(values.shapes[call.inputs[0]]), values.shapes[made]
            if 0 in wanted or given[1] != operation.n_in or any(values.shapes[j] != wanted for j in call.inputs[1:]):
                raise StateError(f"a layer for {operation.n_in} inputs does not take a value of shape {given}")
            return self._layer8(values, i) if isinstance(operation.geometry, Geometry8) else self._layer(values, i)
        if operation.kind == "flatten":
            return []
        x, shape, y = values.number(call.inputs[0]), values.shapes[call.inputs[0]], values.number(made)
        if operation.kind == "mean":
            return [Step(MEAN, 0, x, NONE, y, NONE, math.prod(shape[:2]), math.prod(shape[2:]))]
        if any(values.shapes[j] != shape for j in call.inputs):
            raise StateError("a sum of two shapes is no step of a program")
        onto = values.number(call.inputs[1]) if operation.kind == "add" else NONE
        return [Step(ADD if operation.kind == "add" else RELU, 0, x, onto, y, NONE, math.prod(shape), 1)]

    def _layer8(self, values: _Values, i: int) -> list[Step]:
        call, made = values.calls[i], values.made(i)
        operation = call.operation
        assert isinstance(operation, Sparse) and isinstance(operation.blocks, Blocks8)  # noqa: S101, PT018  for mypy
        images = operation.images(values.shapes[call.inputs[0]])
        layer = layer8(images[:2] if operation.n_dims == 1 else images, operation.blocks, operation.geometry)  # type: ignore[arg-type]
        source = values.root(call.inputs[0])
        reads_bytes = i in values.byte_readers
        layer.bytes_in = int(reads_bytes)
        rounding = values.roundings.get(made)
        layer.next = 0 if rounding is None else rounding.data_ptr()
        self.kept += [layer, rounding]
        x = values.byte_places[source] if reads_bytes else values.number(source)
        onto = values.number(call.inputs[1]) if len(call.inputs) > 1 else NONE
        bytes_out = values.byte_places.get(made, NONE)
        return [Step(INT8, ctypes.addressof(layer), x, onto, values.places.get(made, NONE), bytes_out)]

    def _layer(self, values: _Values, i: int) -> list[Step]:
        call, made = values.calls[i], values.made(i)
        operation = call.operation
        assert isinstance(operation, Sparse) and isinstance(operation.blocks, Blocks)  # noqa: S101, PT018  for mypy
        geometry: Geometry = operation.geometry  # type: ignore[assignment]
        adds = len(call.inputs) > 1
        example = torch.empty(operation.images(values.shapes[call.inputs[0]]))
        plan = Plan(example, operation.blocks, geometry)
        x, y = values.number(call.inputs[0]), values.number(made)
        if adds and not plan.takes(torch.empty(plan.shape)):
            plan = Plan(example, operation.blocks, geometry._replace(relu=0))
            onto, count = values.number(call.inputs[1]), math.prod(plan.shape)
            return [*self._plan(plan, x, NONE, y), Step(ADD, 0, y, onto, y, NONE, count, 1, geometry.relu)]
        return self._plan(plan, x, values.number(call.inputs[1]) if adds else NONE, y)

    def _plan(self, plan: Plan, x: int, onto: int, y: int) -> list[Step]:
        self.kept.append(plan)
        if plan.is_gemv:
            return [Step(GEMV, ctypes.addressof(plan.layer), x, NONE, y, NONE)]
        return [Step(PLAN, plan.address, x, onto, y, NONE)]


class _Values:
    """The values of a program: their shapes, who reads them, and their places.

    Attributes:
        shapes: Of each value.
        roundings: The scale and zero of the bytes to make of a value, by its number.
        byte_readers: Steps that read their first input as bytes.
        alike: Roundings that have to be equal, because their layers read the same bytes.
        places: Of the values that are needed in float32.
        byte_places: Of the values that are needed as bytes.
        n_bytes: Of the arena.
    """

    def __init__(self, calls: Sequence[Call], shapes: Sequence[Shape], outputs: Sequence[int]) -> None:
        self.calls, self.n_inputs = calls, len(shapes)
        self.shapes = list(shapes)
        self.roots = list(range(len(shapes)))
        for call in calls:
            first = call.inputs[0]
            is_same = isinstance(call.operation, Simple) and call.operation.kind == "flatten"
            self.roots.append(self.roots[first] if is_same else len(self.shapes))
            self.shapes.append(call.operation.shape(self.shapes[first]))
        self.roundings: dict[int, Tensor] = {}
        self.byte_readers: set[int] = set()
        self.alike: list[tuple[Tensor, Tensor]] = []
        self._choose_bytes()
        self.places: dict[int, int] = {}
        self.byte_places: dict[int, int] = {}
        self.n_bytes = self._place(outputs)

    def made(self, i: int) -> int:
        """Return the number of the value that step ``i`` makes."""
        return self.n_inputs + i

    def root(self, value: int) -> int:
        """Return the value whose memory this one has."""
        return self.roots[value]

    def number(self, value: int) -> int:
        """Return the place of a value in float32."""
        return self.places[self.root(value)]

    def _choose_bytes(self) -> None:
        """Let a layer of 8 bits make bytes for the layers that read its output with the first reader's rounding."""
        for i, call in enumerate(self.calls):
            source, operation = self.root(call.inputs[0]), call.operation
            if source < self.n_inputs or not isinstance(operation, Sparse) or not operation.takes_bytes:
                continue
            maker = self.calls[source - self.n_inputs].operation
            if not isinstance(maker, Sparse) or not isinstance(maker.blocks, Blocks8):
                continue
            rounding: Tensor = operation.blocks.activation  # type: ignore[union-attr]
            first = self.roundings.setdefault(source, rounding)
            if torch.equal(first, rounding):
                self.byte_readers.add(i)
                self.alike += [(first, rounding)] if first is not rounding else []

    def _place(self, outputs: Sequence[int]) -> int:
        """Give every value its places, and return the size of the arena."""
        for k, value in enumerate(outputs):
            if self.root(value) < self.n_inputs or self.root(value) in self.places:
                raise StateError("two outputs of a program, or an output and an input, cannot share memory")
            self.places[self.root(value)] = OUTSIDE + self.n_inputs + k
        for value in range(self.n_inputs):
            self.places[value] = OUTSIDE + value
        keys: list[tuple[dict[int, int], int]] = []
        lives: list[Life] = []
        last_number, last_byte = self._last_reads()
        for reads, places, size in ((last_number, self.places, 4), (last_byte, self.byte_places, 1)):
            for value, last in reads.items():
                if value not in places:
                    keys.append((places, value))
                    lives.append(Life(size * math.prod(self.shapes[value]), value - self.n_inputs, last))
        starts, n_bytes = place(lives)
        for (places, value), start in zip(keys, starts, strict=True):
            places[value] = start
        return max(n_bytes, 1)

    def _last_reads(self) -> tuple[dict[int, int], dict[int, int]]:
        """Return the last step that reads a value in float32, and the last that reads its bytes, by value."""
        numbers: dict[int, int] = {}
        some_bytes: dict[int, int] = {}
        for i, call in enumerate(self.calls):
            if self.root(self.made(i)) != self.made(i):
                continue
            for n, value in enumerate(call.inputs):
                reads = some_bytes if n == 0 and i in self.byte_readers else numbers
                reads[self.root(value)] = i
        return numbers, some_bytes
