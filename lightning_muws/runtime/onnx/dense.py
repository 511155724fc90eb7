"""Replaces the nodes of our domain in an ONNX model by those of ONNX itself, with dense weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_muws.errors import SettingError
from lightning_muws.runtime.onnx.decode import matrix_of_blocks, signed_blocks, unsigned
from lightning_muws.runtime.onnx.fuse import constant, geometry_of, replace
from lightning_muws.runtime.onnx.operators import DOMAIN, LINEAR, OPERATORS, package

Node = Any  # onnx_ir.Node
Value = Any  # onnx_ir.Value


def make_dense(graph: Any) -> None:
    """Replace our nodes in the graph, in place.

    Args:
        graph: An ``onnx_ir.Graph``.

    Raises:
        SettingError: A layer rounds each sample by its own range.
    """
    for i, node in enumerate(list(graph)):
        if node.domain == DOMAIN:
            replace(graph, [node], list(_Dense(graph, node, f"dense_{i}").nodes()))


class _Dense:
    """One layer as nodes of ONNX.

    Args:
        graph: It gets the weights.
        node: The layer.
        name: Of its values; unique.
    """

    def __init__(self, graph: Any, node: Node, name: str) -> None:
        self.ir, self.graph, self.node, self.name = package("onnx_ir"), graph, node, name
        self.operator = OPERATORS[node.op_type]
        self.geometry = geometry_of(node)
        values = [*node.inputs, *[None] * (len(self.operator.inputs) - len(node.inputs))]
        self.values = dict(zip(self.operator.inputs, values, strict=True))

    def nodes(self) -> Iterator[Node]:
        """Return the nodes in order."""
        x = self.values["x"]
        if self.operator.name == "Int8Sparse":
            if self.geometry[11]:
                raise SettingError(
                    "a layer in 8 bits without calibration rounds each sample by its own range, which plain ONNX "
                    "cannot: give accelerate a calibration, or export with custom_ops=True"
                )
            made = list(self._rounded(x))
            yield from made
            x = made[-1].outputs[0]
        steps = list(self._product(x))
        if self.values["onto"] is not None:
            steps.append(self._step("Add", [steps[-1].outputs[0], self.values["onto"]]))
        if self.geometry[self.operator.relu]:
            steps.append(self._step("Relu", [steps[-1].outputs[0]]))
        yield from steps

    def _product(self, x: Value) -> Iterator[Node]:
        """Return the nodes for ``W x``, and the bias."""
        signed = self.operator.name == "SignedLinear"
        out, kernel = self.geometry[0], [1, 1] if signed else self.geometry[1:3]
        strides, pads, groups = (
            ([1, 1], [0, 0], 1) if signed else (self.geometry[3:5], self.geometry[5:7], self.geometry[7])
        )
        n_in = self.geometry[4] if signed else self.geometry[-2]
        matrix = self._matrix((out, n_in // groups * kernel[0] * kernel[1]))
        bias = constant(self.values.get("bias"))
        if signed or self.geometry[-1] == LINEAR:
            product = self._step("MatMul", [x, self._constant("weight", matrix.T)])
            yield product
            if bias is not None:
                yield self._step("Add", [product.outputs[0], self._constant("bias", bias[:out])])
            return
        weight = matrix.reshape(out, n_in // groups, *kernel)
        inputs = [x, self._constant("weight", weight)]
        if bias is not None:
            inputs.append(self._constant("bias", bias[:out]))
        attributes = {"kernel_shape": kernel, "strides": strides, "pads": [*pads, *pads], "group": groups}
        yield self._step("Conv", inputs, attributes)

    def _matrix(self, shape: tuple[int, int]) -> NDArray[Any]:
        starts, columns = constant(self.values["starts"]), constant(self.values["columns"])
        if self.operator.name == "SignedLinear":
            magnitudes, minus = constant(self.values["magnitudes"]), constant(self.values["minus"])
            return matrix_of_blocks(signed_blocks(magnitudes, minus, *self.geometry[1:3]), starts, columns, shape)
        weights = constant(self.values["weights"])
        if self.operator.name == "BlockSparse":
            return matrix_of_blocks(weights.transpose(0, 2, 1), starts, columns, shape)
        first = columns if self.geometry[9] else (4 * unsigned(columns)).astype(np.uint16)
        whole = matrix_of_blocks(weights.astype(np.float32), starts, first, shape)
        scales: NDArray[np.float32] = constant(self.values["scales"])
        return whole * scales[: shape[0], None]

    def _rounded(self, x: Value) -> Iterator[Node]:
        """Return the nodes that round the input to 8 bits, and back."""
        scale, zero = (float(number) for number in constant(self.values["activation"]))
        if scale == 0:  # all inputs were zero: the layer returns its bias
            yield self._step("Mul", [x, self._constant("nothing", np.float32(0))])
            return
        rounding = [self._constant("scale", np.float32(scale)), self._constant("zero", np.uint8(zero))]
        q = self._step("QuantizeLinear", [x, *rounding])
        yield q
        yield self._step("DequantizeLinear", [q.outputs[0], *rounding])

    def _constant(self, name: str, array: Any) -> Value:
        tensor = self.ir.tensor(np.ascontiguousarray(array) if np.ndim(array) else np.asarray(array))
        value = self.ir.Value(name=f"{self.name}_{name}", const_value=tensor)
        value.shape, value.dtype = tensor.shape, tensor.dtype
        self.graph.register_initializer(value)
        return value

    def _step(self, kind: str, inputs: list[Value], attributes: dict[str, Any] | None = None) -> Node:
        return self.ir.node(kind, inputs, attributes=attributes or {})
