"""Modules that compute a layer by packed blocks. Their weights are buffers; they only run forward."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muws.errors import StateError
from lightning_muws.runtime.native.ops import block_sparse_op, signed_linear_op
from lightning_muws.runtime.native.packing import Packed, PackedSigns
from lightning_muws.runtime.native.plan import Blocks, Geometry, Plan, signed_linear

PLANS = 32  # kept by a layer: one a shape


class BlockSparse(nn.Module):
    """A Linear or a convolution by packed blocks.

    Args:
        packed: The kept blocks of the weight's matrix view.
        bias: ``(out)`` or None.
        geometry: What the layer does.
        n_dims: Dimensions of the input beside the batch: 1 for a Linear, 2 for a Conv1d, 3 for a Conv2d.
    """

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
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self._last: Plan | None = None

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return the layer's output, as the dense layer does; added to ``onto``, before ReLU, where given.

        Raises:
            StateError: If a gradient is asked for, or ``x`` is not float32 on the CPU.
        """
        refuse_gradient(x)
        if self.n_dims == 3 and x.dim() == 4:
            return self.run(x) if onto is None else self.run_onto(x, onto)
        if onto is not None:
            y: Tensor = self._with(relu=0)(x) + onto
            return y.relu_() if self.geometry.relu else y
        if self.n_dims == 3:
            return self.run(x.unsqueeze(0)).squeeze(0)
        if self.n_dims == 2:
            y = self.run(x.unsqueeze(-2) if x.dim() == 3 else x.unsqueeze(0).unsqueeze(-2)).squeeze(-2)
            return y if x.dim() == 3 else y.squeeze(0)
        if x.dim() == 2:
            return self.run(x[..., None, None])[..., 0, 0]
        return self.run(x.reshape(-1, x.shape[-1], 1, 1)).view(*x.shape[:-1], self.geometry.out)

    def run(self, x: Tensor) -> Tensor:
        """Return the output of ``x (n, c, h, w)``."""
        if torch.compiler.is_compiling():
            y: Tensor = block_sparse_op(x, *self._blocks(), list(self.geometry))
            return y
        return self._plan_of(x)(x)

    def run_onto(self, x: Tensor, onto: Tensor) -> Tensor:
        """Return the output of ``x (n, c, h, w)`` added to ``onto``, on the way where both are laid alike."""
        plain = self.geometry._replace(relu=0) if self.geometry.relu else self.geometry
        if torch.compiler.is_compiling():
            y: Tensor = block_sparse_op(x, *self._blocks(), list(plain)) + onto
            return y.relu() if self.geometry.relu else y
        plan = self._plan_of(x)
        if plan.takes(onto):
            return plan(x, onto)
        y = self._plan(x, plain)(x)
        y = y.add_(onto) if onto.shape == y.shape and onto.dtype == y.dtype else y + onto
        return y.relu_() if self.geometry.relu else y

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

    def with_relu(self) -> BlockSparse:
        """Return the same layer with ReLU at its end; both share what is packed, also after a move to a device."""
        return self._with(relu=1)

    def with_batch_last(self) -> BlockSparse:
        """Return the same layer with the images of a batch side by side in its output, for others that read it so."""
        return self._with(batch_lanes=1, batch_last=1)

    def _with(self, **changes: int) -> BlockSparse:
        twin = copy.copy(self)
        twin.geometry = self.geometry._replace(**changes)
        return twin

    def extra_repr(self) -> str:
        """Say the size."""
        return f"blocks={len(self.columns)}, {self.geometry}"


class SignedLinear(nn.Module):
    """A Linear for one sample at a time: unified blocks by their signs, the others by packed blocks.

    Args:
        packed: The unified blocks.
        bias: ``(out)`` or None; None where ``rest`` has it.
        rest: What the other blocks give, or None where there are none.
        n_out: Outputs.
        relu: Whether the output goes through ReLU.
    """

    magnitudes: Tensor
    minus: Tensor
    starts: Tensor
    columns: Tensor
    bias: Tensor | None

    def __init__(
        self, packed: PackedSigns, bias: Tensor | None, rest: BlockSparse | None, n_out: int, relu: bool
    ) -> None:
        super().__init__()
        for name in ("magnitudes", "minus", "starts", "columns"):
            self.register_buffer(name, getattr(packed, name))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.rest = rest
        self.geometry = [n_out, packed.rows, packed.cols, int(relu)]

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, one sample after the other.

        Raises:
            StateError: If a gradient is asked for, or ``x`` is not float32 on the CPU.
        """
        refuse_gradient(x)
        samples = x.reshape(-1, x.shape[-1])
        outputs = [self.one(sample) for sample in samples]
        y = outputs[0].unsqueeze(0) if len(outputs) == 1 else torch.stack(outputs) if outputs else x.new_empty(0)
        return y.view(*x.shape[:-1], self.geometry[0])

    def one(self, x: Tensor) -> Tensor:
        """Return the output of one sample ``x (in)``."""
        run = signed_linear_op if torch.compiler.is_compiling() else signed_linear
        onto = self.bias if self.rest is None else self.rest(x.unsqueeze(0)).squeeze(0)
        y: Tensor = run(x, self.magnitudes, self.minus, self.starts, self.columns, onto, self.geometry)
        return y


def refuse_gradient(x: Tensor) -> None:
    """Raise where a gradient is asked for.

    Raises:
        StateError: If ``x`` requires one and gradients are enabled.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise StateError(
            "a native layer has no gradient: run it under torch.inference_mode(), or train the dense model"
        )
