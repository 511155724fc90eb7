"""Writes the steps of a program down as text and tensors, and runs what is written: what torch's operator takes.

So torch.export and AOTInductor see one operator for all the layers of a chain, with nothing of Python between them.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_muws.errors import StateError
from lightning_muws.runtime.native.library import level
from lightning_muws.runtime.native.plan import Blocks, Geometry, block_sparse, is_small, refuse_gradient
from lightning_muws.runtime.native.plan8 import Blocks8, Geometry8, int8_sparse
from lightning_muws.runtime.native.program import Call, Program, Shape, Simple, Sparse

PROGRAMS = 32  # kept for the operator, one for each shape
ABSENT, LARGE, SMALL = range(3)  # what a layer has in the place of a tensor
LAYERS: dict[str, tuple[Any, Any]] = {"blocks": (Blocks, Geometry), "blocks8": (Blocks8, Geometry8)}


def written(calls: Sequence[Call], outputs: Sequence[int]) -> str:
    """Return steps as text, without the tensors of their layers.

    Args:
        calls: The steps.
        outputs: Numbers of the values to return.

    Example:
        >>> written([Call(Simple("relu"), (0,))], [1])
        '{"steps": [["relu", [0]]], "outputs": [1]}'
    """
    steps: list[list[Any]] = []
    for call in calls:
        step = call.operation
        if isinstance(step, Simple):
            steps.append([step.kind, call.inputs])
        else:
            kind = next(kind for kind, (blocks, _) in LAYERS.items() if isinstance(step.blocks, blocks))
            sizes = [ABSENT if t is None else SMALL if is_small(t) else LARGE for t in step.blocks]
            steps.append([kind, call.inputs, step.n_dims, step.n_in, step.geometry, sizes])
    return json.dumps({"steps": steps, "outputs": list(outputs)})


def tensors_of(calls: Sequence[Call]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors of the layers, in order: the large ones, and those of few elements."""
    layers = [call.operation for call in calls if isinstance(call.operation, Sparse)]
    tensors = [tensor for layer in layers for tensor in layer.blocks if tensor is not None]
    return [t for t in tensors if not is_small(t)], [t for t in tensors if is_small(t)]


def read(text: str, large: Sequence[Tensor], small: Sequence[Tensor]) -> tuple[list[Call], list[int]]:
    """Return the steps that :func:`written` wrote, with their tensors, and the numbers of the values to return."""
    parsed = _parsed(text)
    calls, rest = [], {ABSENT: itertools.repeat(None), LARGE: iter(large), SMALL: iter(small)}
    for kind, inputs, *layer in parsed["steps"]:
        if kind not in LAYERS:
            calls.append(Call(Simple(kind), tuple(inputs)))
            continue
        n_dims, n_in, geometry, sizes = layer
        blocks, geometry_of = LAYERS[kind]
        found = blocks(*(next(rest[size]) for size in sizes))
        calls.append(Call(Sparse(found, geometry_of(*geometry), n_dims, n_in), tuple(inputs)))
    return calls, parsed["outputs"]


@functools.lru_cache(PROGRAMS)
def _parsed(text: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(text)
    return parsed


def output_shapes(shapes: Sequence[Shape], large: Sequence[Tensor], small: Sequence[Tensor], text: str) -> list[Shape]:
    """Return the shapes of the outputs for inputs of these shapes, which may hold symbols of torch's tracing."""
    calls, outputs = read(text, large, small)
    known = list(shapes)
    for call in calls:
        known.append(call.operation.shape(known[call.inputs[0]]))
    return [known[i] for i in outputs]


_programs: OrderedDict[tuple[Any, ...], Program | None] = OrderedDict()


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
    if key not in _programs:
        _programs[key] = _prepared(inputs, large, [t.clone() for t in small], text)
        while len(_programs) > PROGRAMS:
            _programs.popitem(last=False)
    known = _programs[key]
    results = None if known is None else known([x.contiguous() for x in inputs])
    return one_by_one(inputs, *read(text, large, small)) if results is None else results


def _prepared(inputs: list[Tensor], large: list[Tensor], small: list[Tensor], text: str) -> Program | None:
    calls, outputs = read(text, large, small)
    try:
        return Program(calls, [tuple(x.shape) for x in inputs], outputs)
    except StateError:  # the steps one by one raise it again, or have another way
        return None


def one_by_one(inputs: Sequence[Tensor], calls: Sequence[Call], outputs: Sequence[int]) -> list[Tensor]:
    """Return the outputs of steps, each run on its own: where no program is for the shapes, and for NaN in 8 bits."""
    values = list(inputs)
    for call in calls:
        values.append(_run(call.operation, [values[i] for i in call.inputs]))
    return [values[i] for i in outputs]


def _run(operation: Sparse | Simple, inputs: Sequence[Tensor]) -> Tensor:
    x = inputs[0]
    if isinstance(operation, Simple):
        if operation.kind == "add":
            return x + inputs[1]
        if operation.kind == "relu":
            return x.relu()
        return x.mean((2, 3), keepdim=True) if operation.kind == "mean" else x.flatten(1)
    adds = len(inputs) > 1
    geometry = list(operation.geometry._replace(relu=0) if adds else operation.geometry)
    images, blocks = x.reshape(operation.images(tuple(x.shape))), operation.blocks._asdict()
    if isinstance(operation.geometry, Geometry8):
        y = int8_sparse(images.flatten(1) if operation.geometry.linear else images, **blocks, geometry=geometry)
    else:
        y = block_sparse(images, **blocks, geometry=geometry)
    y = y.reshape(operation.shape(tuple(x.shape))).contiguous()
    if not adds:
        return y
    y = y + inputs[1]
    return y.relu() if operation.geometry.relu else y
