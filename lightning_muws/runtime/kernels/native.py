"""Block-sparse kernels in C++, float32 and bfloat16: a Linear or a convolution of blocks of any shape."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_muws.runtime.native.library import level
from lightning_muws.runtime.native.modules import BlockSparse
from lightning_muws.runtime.native.packing import choose_block, pack, pack_pairs
from lightning_muws.runtime.native.plan import Geometry
from lightning_muws.runtime.timing import clock_for

TRIALS = 4
MOST_COLUMNS = 1 << 16  # inputs times kernel: a column's number takes two bytes
FEWEST_GROUP_OUTPUTS = 4  # below, as in a depthwise convolution, a loaded input is hardly used


def build(layer: nn.Module, block_shape: tuple[int, int], example: Tensor, *, relu: bool = False) -> BlockSparse | None:
    """Return the layer by packed float32 blocks, or None where the native kernels do not apply."""
    geometry = geometry_of(layer, example, relu)
    if geometry is None:
        return None
    matrix, bias = matrix_of(layer)
    rows, cols = choose_block(matrix, block_shape, geometry.out // geometry.groups, most_rows())
    packed = pack(matrix, rows, cols)
    return _fastest(
        lambda lanes: BlockSparse(
            packed, bias, geometry._replace(rows=rows, cols=cols, batch_lanes=lanes), _n_dims(layer)
        ),
        example,
    )


def build_bfloat16(
    layer: nn.Module, block_shape: tuple[int, int], example: Tensor, *, relu: bool = False
) -> BlockSparse | None:
    """Return the layer by packed bfloat16 blocks, sums in float32, or None where the CPU has no dot product of them."""
    geometry = geometry_of(layer, example, relu)
    if geometry is None or level() != "avx512_bf16":
        return None
    matrix, bias = matrix_of(layer)
    rows, _ = choose_block(matrix, block_shape, geometry.out // geometry.groups)
    packed = pack_pairs(matrix, rows)
    return _fastest(
        lambda lanes: BlockSparse(
            packed, bias, geometry._replace(rows=rows, cols=2, bfloat16=1, batch_lanes=lanes), _n_dims(layer)
        ),
        example,
    )


def matrix_of(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return the weight as ``(out, in * kernel)`` and the bias, detached."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)  # noqa: S101  geometry_of saw to it
    return weight.detach().reshape(len(weight), -1), bias.detach() if isinstance(bias, Tensor) else None


def geometry_of(layer: nn.Module, example: Tensor, relu: bool) -> Geometry | None:
    """Return what the layer does, or None where the native kernels cannot do it."""
    if level() is None or example.dtype != torch.float32 or example.device.type != "cpu":
        return None
    if type(layer) is nn.Linear:
        geometry = Geometry(layer.out_features, relu=int(relu))
    elif type(layer) in (nn.Conv1d, nn.Conv2d):
        assert isinstance(layer, (nn.Conv1d, nn.Conv2d))  # noqa: S101  for the type checker
        pads = layer.padding
        if pads == "same" and any(k % 2 == 0 for k in layer.kernel_size):
            return None
        if isinstance(pads, str):
            pads = tuple(k // 2 if pads == "same" else 0 for k in layer.kernel_size)
        if layer.padding_mode != "zeros" or any(d != 1 for d in layer.dilation):
            return None
        if layer.groups > 1 and layer.out_channels // layer.groups < FEWEST_GROUP_OUTPUTS:
            return None
        numbers = zip(layer.kernel_size, layer.stride, pads, strict=True)
        (kh, sh, ph), (kw, sw, pw) = [(1, 1, 0), *numbers][-2:]
        geometry = Geometry(layer.out_channels, kh, kw, sh, sw, ph, pw, layer.groups, relu=int(relu))
    else:
        return None
    weight = layer.weight
    fits = weight[0].numel() <= MOST_COLUMNS
    return geometry if fits and weight.dtype == torch.float32 and weight.device.type == "cpu" else None


def most_rows() -> int:
    """Return how many rows of a block are computed together: eight take the 32 registers of AVX-512."""
    return 8 if str(level()).startswith("avx512") else 4


def _n_dims(layer: nn.Module) -> int:
    return {nn.Linear: 1, nn.Conv1d: 2, nn.Conv2d: 3}[type(layer)]


def _fastest(make: Callable[[int], BlockSparse], example: Tensor) -> BlockSparse:
    """Return the fastest of lanes over positions, over the batch and over unfolded positions, tried on the example."""
    ways = [make(lanes) for lanes in (0, 1, 2)]
    if ways[0].n_dims == 1:
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
