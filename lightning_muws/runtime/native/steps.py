"""The steps of a program: what each computes, and the shape of its output. Plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from lightning_muws.runtime.native.plan import Blocks, Geometry
from lightning_muws.runtime.native.plan8 import Blocks8, Geometry8

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

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the shape of the output."""
        g, shape = self.geometry, shapes[0]
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
    """A step without tensors of its own.

    Args:
        kind: What it computes. ``add`` (two inputs of one shape), ``relu``, ``gelu``, ``gelu_tanh``; ``mean`` (of each
            channel: ``(n, c, h, w)`` to ``(n, c, 1, 1)``); ``pool`` (the largest number of each window of
            ``(n, c, h, w)``); ``attention`` (of queries ``(n, heads, t, d)``, keys ``(n, heads, s, d)`` and values
            ``(n, heads, s, w)`` to ``(n, heads, t, w)``); ``copy`` (the same numbers, in order); or a view
            (:mod:`~lightning_muws.runtime.native.views`), which computes nothing.
        numbers: Of a view, what it takes; of ``pool`` its window, stride and border, two numbers each.
        number: Of ``attention``, the factor of each score; 0 for ``1 / sqrt(d)``.
    """

    kind: str
    numbers: tuple[int, ...] = ()
    number: float = 0.0

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the shape of the output of a step that is no view."""
        shape = shapes[0]
        if self.kind == "mean":
            return *shape[:2], 1, 1
        if self.kind == "attention":
            return *shape[:3], shapes[2][3]
        if self.kind == "pool":
            kh, kw, sh, sw, ph, pw = self.numbers
            return *shape[:2], (shape[2] + 2 * ph - kh) // sh + 1, (shape[3] + 2 * pw - kw) // sw + 1
        return shape


class Affine(NamedTuple):
    """The tensors of a normalisation.

    Attributes:
        weight: ``(width)`` float32, or None for ones.
        bias: ``(width)`` float32, or None for zeros.
    """

    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class Norm:
    """LayerNorm over the last dimension.

    Args:
        tensors: Its weight and bias.
        width: Numbers of a row.
        epsilon: What is added to the variance.
    """

    tensors: Affine
    width: int
    epsilon: float

    @classmethod
    def of(cls, layer: nn.LayerNorm) -> Norm:
        """Return the layer as a step."""
        return cls(Affine(layer.weight, layer.bias), layer.normalized_shape[0], layer.eps)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Return the shape of the output."""
        return shapes[0]


@dataclass(frozen=True)
class Call:
    """One step: an operation on values. The inputs of the program are values 0, 1, ...; each step makes the next.

    Args:
        operation: What it computes.
        inputs: Numbers of the values that it reads.
    """

    operation: Sparse | Simple | Norm
    inputs: tuple[int, ...]
