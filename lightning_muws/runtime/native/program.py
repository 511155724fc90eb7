"""Runs layers and the steps between them as one native program over one arena, for inputs of one shape.

What a layer of 8 bits reads goes there as bytes, rounded as that layer would round it. So layers compute exactly what
they compute one by one.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_muws.errors import StateError
from lightning_muws.runtime.native.arena import Life, place
from lightning_muws.runtime.native.library import Step, handle, level
from lightning_muws.runtime.native.plan import Blocks, Geometry, Plan
from lightning_muws.runtime.native.plan8 import Blocks8, Geometry8, layer8
from lightning_muws.runtime.native.steps import Call, Norm, Shape, Simple, Sparse
from lightning_muws.runtime.native.views import is_view, ordered

INT8, PLAN, GEMV, ADD, RELU, MEAN, GELU, GELU_TANH, NORM, ATTENTION, POOL, COPY = range(12)  # STEP_* of api.h
KINDS = {"add": ADD, "relu": RELU, "gelu": GELU, "gelu_tanh": GELU_TANH}
MAKE_BYTES = (*KINDS, "attention", "pool")  # kinds of steps that can round their output for a layer of 8 bits
OUTSIDE = 1 << 48  # PLACE_OUTSIDE of api.h
NONE = -1
ARENAS = 4  # kept between calls: so many threads call at once without a new one
MOST_DIMS = 6  # of MuwsCopy of api.h


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
        self.output_shapes = [values.shapes[i] for i in values.outputs]
        self.kept: list[object] = [calls]  # the steps point into them
        steps = [step for i in range(len(values.calls)) for step in self._steps(values, i)]
        self.steps = (Step * len(steps))(*steps)
        self.n_bytes = values.n_bytes
        self.alike = values.alike
        self.outside = ctypes.c_void_p * (len(shapes) + len(outputs))
        self.arenas: list[Tensor] = []

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the outputs for contiguous float32 inputs; None if NaN or infinity was to be rounded to a byte."""
        outputs = [torch.empty(shape) for shape in self.output_shapes]
        return outputs if self.run([tensor.data_ptr() for tensor in (*inputs, *outputs)]) else None

    def run(self, pointers: Sequence[int]) -> bool:
        """Read and write the memory at these addresses, of the inputs and the outputs.

        Returns:
            Whether the outputs are right: False if NaN or infinity was to be rounded to a byte.
        """
        try:
            arena = self.arenas.pop()  # no other call has it
        except IndexError:
            arena = torch.empty(self.n_bytes, dtype=torch.uint8)
        broken = self.found.muws_program(
            self.level, self.steps, len(self.steps), arena.data_ptr(), self.outside(*pointers), torch.get_num_threads()
        )
        if len(self.arenas) < ARENAS:
            self.arenas.append(arena)
        return not broken

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
        if is_view(call):
            return []
        return [self._norm(values, i) if isinstance(operation, Norm) else self._simple(values, i)]

    def _norm(self, values: _Values, i: int) -> Step:
        call = values.calls[i]
        operation, shape = call.operation, values.shapes[call.inputs[0]]
        assert isinstance(operation, Norm)  # noqa: S101  for mypy
        weight, bias = operation.tensors
        if shape[-1] != operation.width:
            raise StateError(f"a LayerNorm of {operation.width} numbers does not take a value of shape {shape}")
        step = self._step(values, i, NORM, (math.prod(shape[:-1]), shape[-1]))
        step.layer, step.bias = (0 if t is None else t.data_ptr() for t in (weight, bias))
        step.number = operation.epsilon
        return step

    def _simple(self, values: _Values, i: int) -> Step:
        call = values.calls[i]
        operation, shape = call.operation, values.shapes[call.inputs[0]]
        assert isinstance(operation, Simple)  # noqa: S101  for mypy
        if operation.kind == "mean":
            return self._step(values, i, MEAN, (math.prod(shape[:2]), math.prod(shape[2:])))
        if operation.kind == "pool":
            numbers = *shape[2:], *values.shapes[values.made(i)][2:], *operation.numbers
            return self._step(values, i, POOL, (math.prod(shape[:2]), math.prod(shape[2:])), numbers)
        if operation.kind == "attention":
            step = self._step(values, i, ATTENTION, (1, math.prod(shape)), _attention_numbers(values, call, i))
            step.number, step.more = operation.number or shape[-1] ** -0.5, values.number(call.inputs[2])
            return step
        if operation.kind == "copy":
            sizes, copied = _copy_numbers(values, call.inputs[0])
            return self._step(values, i, COPY, (math.prod(sizes[:-1]), sizes[-1]), copied)
        if any(values.shapes[j] != shape for j in call.inputs):
            raise StateError("a sum of two shapes is no step of a program")
        return self._step(values, i, KINDS[operation.kind], (math.prod(shape), 1))

    def _step(
        self, values: _Values, i: int, kind: int, size: tuple[int, int], numbers: Sequence[int] | None = None
    ) -> Step:
        """Return step ``i`` with its places; ``numbers`` are those of the structure that it points to."""
        call, made = values.calls[i], values.made(i)
        inputs = [values.number(value) for value in call.inputs] + [NONE]
        places = inputs[0], inputs[1], values.places.get(made, NONE), values.byte_places.get(made, NONE)
        rounding = values.roundings.get(made)
        structure = None if numbers is None else (ctypes.c_int64 * len(numbers))(*numbers)
        self.kept += [structure, rounding]
        step = Step(kind, 0 if structure is None else ctypes.addressof(structure), *places, *size)
        step.next = 0 if rounding is None else rounding.data_ptr()
        return step

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


def _attention_numbers(values: _Values, call: Call, i: int) -> list[int]:
    """Return the numbers of MuwsAttention of api.h."""
    q, k, v, y = (values.layouts[value] for value in (*call.inputs, values.made(i)))
    if k.shape[:2] != q.shape[:2] or v.shape[:3] != k.shape[:3] or k.shape[3] != q.shape[3]:
        raise StateError(f"attention does not take shapes {q.shape}, {k.shape} and {v.shape}")
    inputs = [number for one in (q, k, v) for number in (one.at, *one.strides[:3])]
    return [*q.shape[:3], k.shape[2], q.shape[3], v.shape[3], *inputs, *y.strides[:3]]


def _copy_numbers(values: _Values, value: int) -> tuple[list[int], list[int]]:
    """Return the sizes of a copy, and the numbers of MuwsCopy of api.h."""
    layout = values.layouts[value]
    dims = [(n, stride) for n, stride in zip(layout.shape, layout.strides, strict=True) if n != 1] or [(1, 1)]
    if len(dims) > MOST_DIMS:
        raise StateError(f"a program copies up to {MOST_DIMS} dimensions, not a value of shape {layout.shape}")
    sizes, strides = ([dim[k] for dim in dims] for k in (0, 1))
    padding = [0] * (MOST_DIMS - len(dims))
    return sizes, [len(dims), layout.at, *sizes, *padding, *strides, *padding]


class _Values:
    """The values of a program: their shapes, who reads them, and their places.

    Attributes:
        calls: The steps, with copies where one needs its input in order.
        layouts: Of each value, where its numbers lie.
        shapes: Of each value.
        outputs: The values to return.
        roundings: The scale and zero of the bytes to make of a value, by its number.
        byte_readers: Steps that read their first input as bytes.
        alike: Roundings that have to be equal, because their layers read the same bytes.
        places: Of the values that are needed in float32.
        byte_places: Of the values that are needed as bytes.
        n_bytes: Of the arena.
    """

    def __init__(self, calls: Sequence[Call], shapes: Sequence[Shape], outputs: Sequence[int]) -> None:
        self.n_inputs = len(shapes)
        self.calls, self.layouts, self.outputs = ordered(calls, shapes, outputs)
        self.shapes = [layout.shape for layout in self.layouts]
        self.roundings: dict[int, Tensor] = {}
        self.byte_readers: set[int] = set()
        self.alike: list[tuple[Tensor, Tensor]] = []
        self._choose_bytes()
        self.places: dict[int, int] = {}
        self.byte_places: dict[int, int] = {}
        self.n_bytes = self._place()

    def made(self, i: int) -> int:
        """Return the number of the value that step ``i`` makes."""
        return self.n_inputs + i

    def root(self, value: int) -> int:
        """Return the value whose memory this one has."""
        return self.layouts[value].root

    def number(self, value: int) -> int:
        """Return the place of a value in float32."""
        return self.places[self.root(value)]

    def _choose_bytes(self) -> None:
        """Let a step make bytes for the layers of 8 bits that read its output, with the first reader's rounding."""
        for i, call in enumerate(self.calls):
            source, operation = self.root(call.inputs[0]), call.operation
            if source < self.n_inputs or not isinstance(operation, Sparse) or not operation.takes_bytes:
                continue
            if not _makes_bytes(self.calls[source - self.n_inputs].operation):
                continue
            rounding: Tensor = operation.blocks.activation  # type: ignore[union-attr]
            first = self.roundings.setdefault(source, rounding)
            if torch.equal(first, rounding):
                self.byte_readers.add(i)
                self.alike += [(first, rounding)] if first is not rounding else []

    def _place(self) -> int:
        """Give every value its places, and return the size of the arena."""
        for k, value in enumerate(self.outputs):
            self.places[self.root(value)] = OUTSIDE + self.n_inputs + k
        for value in range(self.n_inputs):
            self.places[value] = OUTSIDE + value
        keys: list[tuple[dict[int, int], int]] = []
        lives: list[Life] = []
        last_number, last_byte = self._last_reads()
        heirs = self._heirs(last_number)
        for reads, places, size in ((last_number, self.places, 4), (last_byte, self.byte_places, 1)):
            for value, last in reads.items():
                if value not in places and not (reads is last_number and value in heirs):
                    keys.append((places, value))
                    lives.append(Life(size * math.prod(self.shapes[value]), value - self.n_inputs, last))
        starts, n_bytes = place(lives)
        for (places, value), start in zip(keys, starts, strict=True):
            places[value] = start
        self.places |= {value: self.places[of] for value, of in heirs.items()}
        return max(n_bytes, 1)

    def _heirs(self, last: dict[int, int]) -> dict[int, int]:
        """Return the values that take over the memory of another, which their step reads last; prolong its life.

        A step that looks at a number or a row at a time may write where it reads.
        """
        heirs: dict[int, int] = {}
        lives = dict(last)
        for i, call in enumerate(self.calls):
            x, y = self.root(call.inputs[0]), self.made(i)
            is_alike = isinstance(call.operation, Norm) or (
                isinstance(call.operation, Simple) and call.operation.kind in KINDS
            )
            is_inside = x not in self.places and y not in self.places and y in last
            if is_alike and is_inside and lives.get(x) == i:
                heirs[y] = heirs.get(x, x)
                last[heirs[y]] = last[y]
        return heirs

    def _last_reads(self) -> tuple[dict[int, int], dict[int, int]]:
        """Return the last step that reads a value in float32, and the last that reads its bytes, by value."""
        numbers: dict[int, int] = {}
        some_bytes: dict[int, int] = {}
        for i, call in enumerate(self.calls):
            if is_view(call):
                continue
            for n, value in enumerate(call.inputs):
                reads = some_bytes if n == 0 and i in self.byte_readers else numbers
                reads[self.root(value)] = i
        for i, call in enumerate(self.calls):  # what nobody reads needs a place too
            if not is_view(call) and self.made(i) not in (*numbers, *some_bytes):
                numbers[self.made(i)] = i
        return numbers, some_bytes


def _makes_bytes(operation: Sparse | Simple | Norm) -> bool:
    if isinstance(operation, Sparse):
        return isinstance(operation.blocks, Blocks8)
    return isinstance(operation, Norm) or operation.kind in MAKE_BYTES
