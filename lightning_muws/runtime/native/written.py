"""Writes the steps of a program down as text and tensors, and runs what is written: what torch's operator takes.

So torch.export and AOTInductor see one operator for all the layers of a chain, with nothing of Python between them.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_muws.errors import StateError
from lightning_muws.runtime.native.library import level
from lightning_muws.runtime.native.parts import Parts, prepared
from lightning_muws.runtime.native.plan import Blocks, Geometry, block_sparse, is_small, refuse_gradient
from lightning_muws.runtime.native.plan8 import Blocks8, Geometry8, int8_sparse
from lightning_muws.runtime.native.program import Program
from lightning_muws.runtime.native.steps import Affine, Call, Norm, Simple, Sparse
from lightning_muws.runtime.native.views import VIEWS, target

PROGRAMS = 32  # kept for the operator, one for each shape
ABSENT, LARGE, SMALL = range(3)  # what a layer has in the place of a tensor
LAYERS: dict[str, tuple[Any, Any]] = {"blocks": (Blocks, Geometry), "blocks8": (Blocks8, Geometry8)}
NORM = "norm"


def written(calls: Sequence[Call], outputs: Sequence[int]) -> str:
    """Return steps as text, without the tensors of their layers.

    Args:
        calls: The steps.
        outputs: Numbers of the values to return.

    Example:
        >>> written([Call(Simple("relu"), (0,))], [1])
        '{"steps": [["relu", [0], [], 0.0]], "outputs": [1]}'
    """
    return json.dumps({"steps": [_step(call) for call in calls], "outputs": list(outputs)})


def _step(call: Call) -> list[Any]:
    step = call.operation
    if isinstance(step, Simple):
        return [step.kind, call.inputs, step.numbers, step.number]
    sizes = [ABSENT if t is None else SMALL if is_small(t) else LARGE for t in _tensors(step)]
    if isinstance(step, Norm):
        return [NORM, call.inputs, sizes, step.width, step.epsilon]
    kind = next(kind for kind, (blocks, _) in LAYERS.items() if isinstance(step.blocks, blocks))
    return [kind, call.inputs, sizes, step.geometry, step.n_dims, step.n_in]


def _tensors(step: Sparse | Norm) -> tuple[Tensor | None, ...]:
    return step.tensors if isinstance(step, Norm) else step.blocks


def tensors_of(calls: Sequence[Call]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors of the layers, in order: the large ones, and those of few elements."""
    layers = [call.operation for call in calls if not isinstance(call.operation, Simple)]
    tensors = [tensor for layer in layers for tensor in _tensors(layer) if tensor is not None]
    return [t for t in tensors if not is_small(t)], [t for t in tensors if is_small(t)]


def read(text: str, large: Sequence[Tensor], small: Sequence[Tensor]) -> tuple[list[Call], list[int]]:
    """Return the steps that :func:`written` wrote, with their tensors, and the numbers of the values to return."""
    parsed = _parsed(text)
    calls, rest = [], {ABSENT: itertools.repeat(None), LARGE: iter(large), SMALL: iter(small)}
    for kind, inputs, first, *others in parsed["steps"]:
        operation: Sparse | Simple | Norm
        if kind == NORM:
            operation = Norm(Affine(*(next(rest[size]) for size in first)), *others)
        elif kind in LAYERS:
            blocks, geometry = LAYERS[kind]
            operation = Sparse(blocks(*(next(rest[size]) for size in first)), geometry(*others[0]), *others[1:])
        else:
            operation = Simple(kind, tuple(first), *others)
        calls.append(Call(operation, tuple(inputs)))
    return calls, parsed["outputs"]


@functools.lru_cache(PROGRAMS)
def _parsed(text: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(text)
    return parsed


_programs: OrderedDict[tuple[Any, ...], tuple[Program | Parts | None]] = OrderedDict()


def program(inputs: list[Tensor], large: list[Tensor], small: list[Tensor], text: str) -> list[Tensor]:
    """Return the outputs of written steps, float32, contiguous.

    Args:
        inputs: Float32 on the CPU.
        large: Tensors of the layers. They are told from others by their addresses.
        small: The others, told by their numbers: a program of AOTInductor makes small constants anew at each call.
        text: The steps.

    Raises:
        StateError: An input needs a gradient or is not float32 on the CPU, the kernels are not installed, or a layer
            does not fit.
    """
    for x in inputs:
        refuse_gradient(x)
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise StateError(f"native layers compute in float32 on the CPU; got {x.dtype} on {x.device}: convert it")
    numbers = [tuple(t.flatten().tolist()) for t in small]
    key = (level(), text, *(x.shape for x in inputs), *map(Tensor.data_ptr, large), *numbers)
    found = _programs.get(key)
    if found is None:
        found = _programs[key] = (_prepared(inputs, large, [t.clone() for t in small], text),)
        while len(_programs) > PROGRAMS:
            _programs.popitem(last=False)
    (prepared_program,) = found
    results = None if prepared_program is None else prepared_program([x.contiguous() for x in inputs])
    return one_by_one(inputs, *read(text, large, small)) if results is None else results


def _prepared(inputs: list[Tensor], large: list[Tensor], small: list[Tensor], text: str) -> Program | Parts | None:
    calls, outputs = read(text, large, small)
    try:
        return prepared(calls, [tuple(x.shape) for x in inputs], outputs)
    except StateError:  # the steps one by one raise it again, or have another way
        return None


Layer = Callable[[Sparse, Tensor], Tensor]


def one_by_one(
    inputs: Sequence[Tensor], calls: Sequence[Call], outputs: Sequence[int], layer: Layer | None = None
) -> list[Tensor]:
    """Return the outputs of steps, each run on its own: where no program is for the shapes, and for NaN in 8 bits.

    Args:
        inputs: Of the first steps.
        calls: The steps.
        outputs: Numbers of the values to return.
        layer: What computes a layer; the default uses the kernels.
    """
    values = list(inputs)
    for call in calls:
        values.append(_run(call.operation, [values[i] for i in call.inputs], layer or by_kernel))
    return [values[i] for i in outputs]


def traced(inputs: Sequence[Tensor], large: Sequence[Tensor], small: Sequence[Tensor], text: str) -> list[Tensor]:
    """Return tensors like the outputs of :func:`program`, for torch's tracing, whose sizes may be symbols."""
    found = one_by_one(inputs, *read(text, large, small), lambda step, x: x.new_empty(step.shape([tuple(x.shape)])))
    return [x.new_empty(x.shape) for x in found]


def by_kernel(step: Sparse, x: Tensor) -> Tensor:
    """Return the output of one layer, without what is added to it."""
    images, blocks = x.reshape(step.images(tuple(x.shape))), step.blocks._asdict()
    if isinstance(step.geometry, Geometry8):
        y = int8_sparse(images.flatten(1) if step.geometry.linear else images, **blocks, geometry=list(step.geometry))
    else:
        y = block_sparse(images, **blocks, geometry=list(step.geometry))
    return y.reshape(step.shape([tuple(x.shape)])).contiguous()


def _run(step: Sparse | Simple | Norm, inputs: Sequence[Tensor], layer: Layer) -> Tensor:
    x = inputs[0]
    if isinstance(step, Norm):
        return F.layer_norm(x, (step.width,), *step.tensors, step.epsilon)
    if isinstance(step, Simple):
        return _simple(step, inputs)
    if len(inputs) == 1:
        return layer(step, x)
    y = layer(replace(step, geometry=step.geometry._replace(relu=0)), x) + inputs[1]
    return y.relu() if step.geometry.relu else y


def _simple(step: Simple, inputs: Sequence[Tensor]) -> Tensor:
    x, n = inputs[0], step.numbers
    if step.kind in VIEWS:
        if step.kind == "reshape":
            return x.reshape(target(n, [tuple(t.shape) for t in inputs]))
        return x.flatten(*n) if step.kind == "flatten" else VIEWS[step.kind](x, n, [])
    return FUNCTIONS[step.kind](step, *inputs)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "add": lambda step, x, y: x + y,
    "relu": lambda step, x: x.relu(),
    "gelu": lambda step, x: F.gelu(x),
    "gelu_tanh": lambda step, x: F.gelu(x, approximate="tanh"),
    "mean": lambda step, x: x.mean((2, 3), keepdim=True),
    "pool": lambda step, x: F.max_pool2d(x, step.numbers[:2], step.numbers[2:4], step.numbers[4:]),
    "attention": lambda step, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=step.number or None),
    "copy": lambda step, x: x.contiguous(),
}
"""What torch does for each step that has no tensors of its own and is no view."""
