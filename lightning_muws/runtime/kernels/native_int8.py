"""Block-sparse kernels in C++ with 8-bit weights and inputs: a Linear or a convolution of blocks of any shape."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_muws.runtime.kernels.base import Kernel, Layer, bias_of, matrix_of
from lightning_muws.runtime.kernels.native import geometry_of, is_native
from lightning_muws.runtime.native.ops import int8_sparse_op
from lightning_muws.runtime.native.plan import refuse_gradient
from lightning_muws.runtime.native.plan8 import Blocks8, Geometry8, Plan8
from lightning_muws.runtime.native.quantize import Packed8, choose_rows, pack8, quantized
from lightning_muws.runtime.native.steps import Sparse

LEVELS = 255  # steps between the smallest and the largest input
PLANS = 32  # kept by a layer: one for each shape


@dataclass(frozen=True)
class Activation:
    """How a layer's inputs are rounded to 8 bits: ``x = scale * (q - zero)``, q a whole number from 0 to 255.

    Args:
        scale: The step; 0 if all inputs are zero.
        zero: The whole number that stands for 0.
        way: How the range was found, for the report.
    """

    scale: float
    zero: int
    way: str = "range"

    @classmethod
    def of(cls, low: float, high: float, way: str = "range") -> Activation:
        """Return the rounding for inputs from ``low`` to ``high``; the range is widened to include 0.

        Example:
            >>> Activation.of(-1.0, 254.0)
            Activation(scale=1.0, zero=1, way='range')
        """
        low, high = min(low, 0.0), max(high, 0.0)
        scale = float(torch.tensor(high / LEVELS - low / LEVELS, dtype=torch.float32))
        if scale < torch.finfo(torch.float32).tiny:
            return cls(0.0, 0, way)
        return cls(scale, min(LEVELS, round(-low / scale)), way)


class Int8Sparse(Kernel):
    """A Linear or a convolution by packed 8-bit blocks, between float32 inputs and outputs.

    Inputs outside the range of ``activation`` saturate. NaN or infinity makes NaN of the whole sample of a Linear, and
    in a convolution of the output rows that read an input row with it.

    Args:
        packed: The kept blocks.
        bias: ``(out)`` float32, or None.
        geometry: What the layer computes.
        n_dims: Dimensions of the input beside the batch: 1 for a Linear, 2 for a Conv1d, 3 for a Conv2d.
        activation: How inputs are rounded; None: each sample of a Linear by its own range.
    """

    can_add = True
    weights: Tensor
    starts: Tensor
    columns: Tensor
    sums: Tensor
    scales: Tensor
    bias: Tensor | None
    activation: Tensor

    def __init__(
        self, packed: Packed8, bias: Tensor | None, geometry: Geometry8, n_dims: int, activation: Activation | None
    ) -> None:
        super().__init__()
        for name in ("weights", "starts", "columns", "sums", "scales"):
            self.register_buffer(name, getattr(packed, name))
        self.register_buffer("bias", None if bias is None else F.pad(bias, (0, len(packed.sums) - len(bias))))
        rounding = activation or Activation(0.0, 0, "dynamic")
        self.register_buffer("activation", torch.tensor([rounding.scale, float(rounding.zero)]))
        self.way = rounding.way
        self.geometry, self.n_dims = geometry, n_dims
        self.relu = bool(geometry.relu)
        self._plans: dict[tuple[Any, ...], Plan8] = {}
        self._last: Plan8 | None = None

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return the layer's output; ``onto``, if given, is added to it before ReLU.

        Raises:
            StateError: If ``x`` needs a gradient, is not float32 on the CPU, or is not as wide as the layer.
        """
        refuse_gradient(x)
        if x.dim() == 4 if self.n_dims == 3 else x.dim() == 2 and self.n_dims == 1:
            return self.run(x, onto)
        if self.n_dims == 1:
            rows = x.reshape(-1, x.shape[-1])
            shape = (*x.shape[:-1], self.geometry.out)
            fits = onto is not None and onto.shape == shape
            y = self.run(rows, onto.reshape(-1, self.geometry.out)) if fits and onto is not None else None
            if y is not None or onto is None:
                return (self.run(rows) if y is None else y).view(shape)
        elif onto is None and self.n_dims == 3:
            return self.run(x.unsqueeze(0)).squeeze(0)
        elif onto is None:
            y = self.run(x.unsqueeze(-2) if x.dim() == 3 else x.unsqueeze(0).unsqueeze(-2)).squeeze(-2)
            return y if x.dim() == 3 else y.squeeze(0)
        total: Tensor = self._with(relu=0)(x) + onto
        return total.relu_() if self.relu else total

    def run(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return the output for ``x``, ``(n, in)`` if the layer is a Linear, else ``(n, c, h, w)``, plus ``onto``."""
        plain = self.geometry._replace(relu=0) if onto is not None else self.geometry
        if torch.compiler.is_compiling():
            y: Tensor = int8_sparse_op(x, *self._blocks(), list(plain))
            if onto is not None:
                y = y + onto
                y = y.relu() if self.relu else y
            return y
        plan = self._last
        if plan is None or not plan.is_for(x, self._buffers):
            self._last = plan = self._plan(x, self.geometry)
        if onto is None or plan.takes(onto):
            return plan(x, onto)
        y = self._plan(x, plain)(x) + onto
        return y.relu_() if self.relu else y

    def _blocks(self) -> Blocks8:
        buffers = self._buffers  # quicker than attributes
        return Blocks8(*(buffers[name] for name in Blocks8._fields))  # type: ignore[arg-type] # most are Tensors

    def _plan(self, x: Tensor, geometry: Geometry8) -> Plan8:
        blocks = self._blocks()
        pointers = map(id, blocks)
        key = (x.dtype, x.device, x.shape, geometry.relu, *pointers, blocks.weights.data_ptr())
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= PLANS:
                self._plans.clear()
            plan = self._plans[key] = Plan8(x, blocks, geometry)
        return plan

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}, "_last": None}  # they hold addresses

    def with_relu(self) -> Int8Sparse:
        """Return the same layer with ReLU at its end; the two share what is packed, even after a move to a device."""
        return self._with(relu=1)

    def _with(self, **changes: int) -> Int8Sparse:
        twin = copy.copy(self)
        twin.geometry = self.geometry._replace(**changes)
        twin.relu = bool(twin.geometry.relu)
        return twin

    def step(self, n_in: int) -> Sparse:
        """Return the layer as a step."""
        return Sparse(self._blocks(), self.geometry, self.n_dims, n_in)

    def extra_repr(self) -> str:
        """Return the number of blocks, the way inputs are rounded, and the geometry."""
        return f"blocks={len(self.columns)}, inputs={self.way}, {self.geometry}"


def build(layer: nn.Module, block_shape: tuple[int, int], example: Tensor) -> Int8Sparse | None:
    """Return a Linear in 8 bits, each sample rounded by its own range, or None if it does not apply.

    A convolution needs the range of its inputs, which no single example tells: see :func:`build_static`.
    """
    return _build(layer, example, None) if isinstance(layer, nn.Linear) else None


def build_static(layer: nn.Module, example: Tensor, activation: Activation) -> Int8Sparse | None:
    """Return a Linear or a convolution in 8 bits whose inputs all have the same range, or None if it does not apply."""
    return _build(layer, example, activation)


def _build(layer: nn.Module, example: Tensor, activation: Activation | None) -> Int8Sparse | None:
    if not is_native(layer, example) or not bool(layer.weight.isfinite().all()):
        return None
    g, matrix = geometry_of(layer), matrix_of(layer)
    weights = quantized(matrix)
    rows, loose = choose_rows(weights.whole, g.out // g.groups)
    return assemble(layer, pack8(weights, rows, loose), activation)


def assemble(layer: Layer, packed: Packed8, activation: Activation | None) -> Int8Sparse:
    """Return the layer with these blocks."""
    linear = int(isinstance(layer, nn.Linear))
    g = geometry_of(layer)
    geometry = Geometry8(*g[:8], packed.rows, int(packed.loose), linear, int(activation is None), n_in=g.n_in)
    return Int8Sparse(packed, bias_of(layer), geometry, layer.weight.dim() - 1, activation)
