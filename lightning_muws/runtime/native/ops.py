"""The kernels as torch operators, with shapes for tracing: torch.compile and torch.export see one node each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_muws.runtime.native.plan import Geometry, batch_last_strides, block_sparse, is_batch_last, signed_linear
from lightning_muws.runtime.native.plan8 import Geometry8, int8_sparse
from lightning_muws.runtime.native.written import program, traced

block_sparse_op = torch.library.custom_op("lightning_muws::block_sparse", block_sparse, mutates_args=())
signed_linear_op = torch.library.custom_op("lightning_muws::signed_linear", signed_linear, mutates_args=())

int8_sparse_op = torch.library.custom_op("lightning_muws::int8_sparse", int8_sparse, mutates_args=())

# Called for each input of a network: custom_op's checks would cost more than all of the operator's own Python.
_library: Any = torch.library.Library("lightning_muws", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("program(Tensor[] inputs, Tensor[] large, Tensor[] small, str text) -> Tensor[]")
_library.impl("program", program, "CPU")
program_op = torch.ops.lightning_muws.program.default


@block_sparse_op.register_fake
def _(
    x: Tensor,
    weights: Tensor,
    starts: Tensor,
    columns: Tensor,
    logical: Tensor | None,
    bias: Tensor | None,
    geometry: list[int],
) -> Tensor:
    g = Geometry(*geometry)
    shape = g.out_shape(x.shape[0], x.shape[2], x.shape[3])
    if g.batch_lanes == 1 and x.shape[0] > 1 and (g.batch_last or is_batch_last(x)):
        return x.new_empty_strided(shape, batch_last_strides(shape))
    return x.new_empty(shape)


@signed_linear_op.register_fake
def _(
    x: Tensor,
    magnitudes: Tensor,
    minus: Tensor,
    starts: Tensor,
    columns: Tensor,
    onto: Tensor | None,
    geometry: list[int],
) -> Tensor:
    return x.new_empty(geometry[0])


@int8_sparse_op.register_fake
def _(
    x: Tensor,
    weights: Tensor,
    starts: Tensor,
    columns: Tensor,
    sums: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    activation: Tensor,
    geometry: list[int],
) -> Tensor:
    return x.new_empty(Geometry8(*geometry).out_shape(x.shape))


torch.library.register_fake("lightning_muws::program", traced)
