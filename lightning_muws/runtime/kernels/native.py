"""Block-sparse kernels in C++, float32 and bfloat16: a Linear or a convolution of blocks of any shape."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lightning_muws.runtime.kernels.base import Kernel, Layer, bias_of, is_plain, matrix_of
from lightning_muws.runtime.native.library import BFLOAT16_LEVEL, level
from lightning_muws.runtime.native.ops import block_sparse_op
from lightning_muws.runtime.native.packing import Packed, choose_block, pack, pack_pairs
from lightning_muws.runtime.native.plan import Blocks, Geometry, Plan, refuse_gradient
from lightning_muws.runtime.native.steps import Sparse
from lightning_muws.runtime.timing import clock_for

TRIALS = 4
MOST_COLUMNS = 1 << 16  # inputs times kernel: a column's number takes two bytes
FEWEST_GROUP_OUTPUTS = 4  # with fewer, as in a depthwise convolution, too few products use each loaded input
PLANS = 32  # kept by a layer: one for each shape


class BlockSparse(Kernel):
    """A Linear or a convolution by packed blocks.

    Args:
        packed: The kept blocks of the weight's matrix view.
        bias: ``(out)`` float32, or None.
        geometry: What the layer computes.
        n_dims: Dimensions of the input beside the batch: 1 for a Linear, 2 for a Conv1d, 3 for a Conv2d.
    """

    can_add = True
    weights: Tensor
    starts: Tensor
    columns: Tensor
    logical: Tensor | None
    bias: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None, geometry: Geometry, n_dims: int) -> None:
        super().__init__()
        self.register_buffer("weights", packed.weights)
        self.register_buffer("starts", packed.starts)
        self.register_buffer("columns", packed.columns)
        self.register_buffer("logical", packed.logical)
        if bias is not None:
            padded = bias.new_zeros((len(packed.starts) - 1) * packed.rows)
            padded[: len(bias)] = bias.detach()
            bias = padded
        self.register_buffer("bias", bias)
        self.geometry, self.n_dims = geometry, n_dims
        self.relu = bool(geometry.relu)
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self._last: Plan | None = None

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return the layer's output; ``onto``, if given, is added to it before ReLU.

        Raises:
            StateError: If ``x`` needs a gradient, is not float32 on the CPU, or is not as wide as the layer.
        """
        refuse_gradient(x)
        if self.n_dims == 3 and x.dim() == 4:
            return self.run(x) if onto is None else self.run_onto(x, onto)
        if onto is not None:
            y: Tensor = self._with(relu=0)(x) + onto
            return y.relu_() if self.relu else y
        if self.n_dims == 3:
            return self.run(x.unsqueeze(0)).squeeze(0)
        if self.n_dims == 2:
            y = self.run(x.unsqueeze(-2) if x.dim() == 3 else x.unsqueeze(0).unsqueeze(-2)).squeeze(-2)
            return y if x.dim() == 3 else y.squeeze(0)
        if x.dim() == 2:
            return self.run(x[..., None, None])[..., 0, 0]
        return self.run(x.reshape(-1, x.shape[-1], 1, 1)).view(*x.shape[:-1], self.geometry.out)

    def run(self, x: Tensor) -> Tensor:
        """Return the output for ``x (n, c, h, w)``."""
        if torch.compiler.is_compiling():
            y: Tensor = block_sparse_op(x, *self._blocks(), list(self.geometry))
            return y
        return self._plan_of(x)(x)

    def run_onto(self, x: Tensor, onto: Tensor) -> Tensor:
        """Return the output for ``x (n, c, h, w)`` plus ``onto``; the kernel itself adds if the layouts agree."""
        plain = self.geometry._replace(relu=0) if self.relu else self.geometry
        if torch.compiler.is_compiling():
            y: Tensor = block_sparse_op(x, *self._blocks(), list(plain)) + onto
            return y.relu() if self.relu else y
        plan = self._plan_of(x)
        if plan.takes(onto):
            return plan(x, onto)
        y = self._plan(x, plain)(x)
        y = y.add_(onto) if onto.shape == y.shape and onto.dtype == y.dtype else y + onto
        return y.relu_() if self.relu else y

    def _blocks(self) -> Blocks:
        buffers = self._buffers  # quicker than attributes
        return Blocks(*(buffers[name] for name in Blocks._fields))  # type: ignore[arg-type] # weights is a Tensor

    def _plan_of(self, x: Tensor) -> Plan:
        last = self._last
        if last is None or not last.is_for(x, self._buffers):
            self._last = last = self._plan(x, self.geometry)
        return last

    def _plan(self, x: Tensor, geometry: Geometry) -> Plan:
        blocks = self._blocks()
        key = (x.dtype, x.shape, x.stride(), geometry.relu, *map(id, blocks), blocks.weights.data_ptr())
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= PLANS:
                self._plans.clear()
            plan = self._plans[key] = Plan(x, blocks, geometry)
        return plan

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}, "_last": None}  # they hold addresses

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.logical is not None:  # plans hold numbers of the old one, and know it as this object
            self.logical = self.logical.clone()

    def with_relu(self) -> BlockSparse:
        """Return the same layer with ReLU at its end; the two share what is packed, even after a move to a device."""
        return self._with(relu=1)

    def with_batch_last(self) -> BlockSparse:
        """Return the same layer with the images of a batch side by side in its output, for layers that read it so."""
        return self._with(batch_lanes=1, batch_last=1)

    def _with(self, **changes: int) -> BlockSparse:
        twin = copy.copy(self)
        twin.geometry = self.geometry._replace(**changes)
        twin.relu = bool(twin.geometry.relu)
        return twin

    def step(self, n_in: int) -> Sparse | None:
        """Return the layer as a step, or None if its outputs are laid side by side."""
        return None if self.geometry.batch_last else Sparse(self._blocks(), self.geometry, self.n_dims, n_in)

    def extra_repr(self) -> str:
        """Return the number of blocks and the geometry."""
        return f"blocks={len(self.columns)}, {self.geometry}"


def build(layer: nn.Module, block_shape: tuple[int, int], example: Tensor) -> BlockSparse | None:
    """Return the layer by packed float32 blocks, or None if the native kernels do not apply."""
    if not is_native(layer, example):
        return None
    geometry, matrix = geometry_of(layer), matrix_of(layer)
    rows, cols = choose_block(matrix, block_shape, geometry.out // geometry.groups, most_rows())
    return _fastest(layer, pack(matrix, rows, cols), geometry, example)


def build_bfloat16(layer: nn.Module, block_shape: tuple[int, int], example: Tensor) -> BlockSparse | None:
    """Return the layer by packed bfloat16 blocks, sums in float32, or None if the CPU has no bfloat16 dot product."""
    if not is_native(layer, example) or level() != BFLOAT16_LEVEL:
        return None
    geometry, matrix = geometry_of(layer)._replace(bfloat16=1), matrix_of(layer)
    rows, _ = choose_block(matrix, block_shape, geometry.out // geometry.groups)
    packed = pack_pairs(matrix, rows)
    assert packed.logical is not None  # noqa: S101  for mypy
    return _fastest(layer, packed, geometry._replace(mark=zlib.crc32(packed.logical.numpy().tobytes())), example)


def is_native(layer: nn.Module, example: Tensor) -> TypeGuard[Layer]:
    """Return whether the native kernels are installed and can compute the layer for this input."""
    if level() is None or example.dtype != torch.float32 or example.device.type != "cpu":
        return False
    if not is_plain(layer) or layer.weight.dtype != torch.float32 or layer.weight.device.type != "cpu":
        return False
    if layer.weight.shape[1:].numel() > MOST_COLUMNS:
        return False
    if isinstance(layer, nn.Linear):
        return True
    if any(d != 1 for d in layer.dilation) or (layer.padding == "same" and any(k % 2 == 0 for k in layer.kernel_size)):
        return False
    return layer.groups == 1 or layer.out_channels // layer.groups >= FEWEST_GROUP_OUTPUTS


def geometry_of(layer: Layer) -> Geometry:
    """Return what a layer computes for which :func:`is_native` holds."""
    if isinstance(layer, nn.Linear):
        return Geometry(layer.out_features, n_in=layer.in_features)
    pads = layer.padding
    if isinstance(pads, str):
        pads = tuple(k // 2 if pads == "same" else 0 for k in layer.kernel_size)
    numbers = zip(layer.kernel_size, layer.stride, pads, strict=True)
    (kh, sh, ph), (kw, sw, pw) = [(1, 1, 0), *numbers][-2:]  # a Conv1d is a Conv2d of one row
    return Geometry(layer.out_channels, kh, kw, sh, sw, ph, pw, layer.groups, n_in=layer.in_channels)


def most_rows() -> int:
    """Return how many rows of a block are computed together: eight take the 32 registers of AVX-512."""
    return 8 if str(level()).startswith("avx512") else 4


def _fastest(layer: Layer, packed: Packed, geometry: Geometry, example: Tensor) -> BlockSparse:
    """Return the layer with the lanes (positions, batch, unfolded positions) that run fastest on the example."""
    geometry = geometry._replace(rows=packed.rows, cols=packed.cols)
    bias, n_dims = bias_of(layer), layer.weight.dim() - 1
    ways = [BlockSparse(packed, bias, geometry._replace(batch_lanes=lanes), n_dims) for lanes in (0, 1, 2)]
    if n_dims == 1:
        return ways[1]
    clock = clock_for(example.device)
    with torch.inference_mode():
        rounds = [[_timed(way, example, clock) for way in ways] for _ in range(1 + TRIALS)][1:]  # the first makes plans
    best = [min(times) for times in zip(*rounds, strict=True)]
    return ways[best.index(min(best))]


def _timed(module: nn.Module, example: Tensor, clock: Callable[[], float]) -> float:
    start = clock()
    module(example)
    return clock() - start
