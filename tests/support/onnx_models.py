"""ONNX models of one operator of ours, made by hand, and sessions for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from lightning_muws.runtime.kernels.native import BlockSparse
from lightning_muws.runtime.kernels.native_int8 import Int8Sparse
from lightning_muws.runtime.kernels.signs import SignedLinear
from lightning_muws.runtime.onnx.library import onnx_library
from lightning_muws.runtime.onnx.operators import DOMAIN, IMAGES, LINEAR, OPERATORS


@dataclass(frozen=True)
class Layer:
    """One node: what it is, its numbers, and its constants by the names of its inputs."""

    kind: str
    geometry: list[int]
    constants: Mapping[str, np.ndarray]
    has_onto: bool = False
    open_inputs: tuple[str, ...] = field(default=())  # given at every call, although they should be constants

    def with_number(self, place: int, number: int) -> Layer:
        geometry = list(self.geometry)
        geometry[place] = number
        return replace(self, geometry=geometry)

    def with_constant(self, name: str, array: np.ndarray) -> Layer:
        return replace(self, constants={**self.constants, name: array})

    def model(self) -> onnx.ModelProto:
        """Return a model that computes the layer for any input."""
        given = ["x", *(["onto"] if self.has_onto else []), *self.open_inputs]
        names = [
            name if name in given or self.constants.get(name) is not None else ""
            for name in OPERATORS[self.kind].inputs
        ]
        while not names[-1]:
            names.pop()
        node = helper.make_node(self.kind, names, ["y"], domain=DOMAIN, geometry=self.geometry)
        constants = {n: a for n, a in self.constants.items() if a is not None and n not in self.open_inputs}
        graph = helper.make_graph(
            [node],
            "layer",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in given],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def session(model: onnx.ModelProto | bytes, threads: int = 1) -> onnxruntime.InferenceSession:
    """Return a session that knows our operators."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    if threads > 1:
        options.add_session_config_entry("lightning_muws.threads", str(threads))
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the machine may be busy
    options.log_severity_level = 4  # what it refuses, it raises too
    options.register_custom_ops_library(str(onnx_library()))
    data = model if isinstance(model, bytes) else model.SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(layer: Layer, **inputs: torch.Tensor) -> torch.Tensor:
    """Return what ONNX Runtime computes."""
    return torch.from_numpy(session(layer.model()).run(None, {name: x.numpy() for name, x in inputs.items()})[0])


def layer_of(kernel: BlockSparse | SignedLinear | Int8Sparse, has_onto: bool = False) -> Layer:
    """Return a kernel as a node."""
    if isinstance(kernel, SignedLinear):
        geometry = [kernel.n_out, *kernel.block_shape, int(kernel.relu), kernel.n_in]
        return Layer("SignedLinear", geometry, _arrays(kernel), has_onto)
    g = kernel.geometry
    if isinstance(kernel, Int8Sparse):
        return Layer("Int8Sparse", [*g, LINEAR if g.linear else IMAGES], _arrays(kernel), has_onto)
    geometry = [*g[:11], g.batch_lanes, g.n_in, kernel.n_dims]
    return Layer("BlockSparse", geometry, {n: a for n, a in _arrays(kernel).items() if n != "logical"}, has_onto)


def _arrays(kernel: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in kernel.named_buffers(recurse=False)}
