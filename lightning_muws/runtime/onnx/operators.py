"""The operators of our domain in ONNX: their inputs, their one attribute, and what torch's exporter writes for ours.

``native/src/onnx.cpp`` computes them. The attribute ``geometry`` holds the numbers of the layer in a fixed order:

* ``BlockSparse``: out, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, groups, rows, cols, relu, lanes, inputs,
  dims
* ``SignedLinear``: out, rows, cols, relu, inputs
* ``Int8Sparse``: out, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, groups, rows, loose, linear, dynamic, relu,
  inputs, dims

``inputs`` are the numbers of a sample or the channels of an image, ``dims`` the dimensions of the input beside the
batch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_muws.errors import SettingError
from lightning_muws.runtime.native.ops import block_sparse_op, int8_sparse_op, signed_linear_op
from lightning_muws.runtime.native.plan import Geometry

DOMAIN = "lightning_muws"
VERSION = 1  # of the domain; a change of an operator makes the next
IMAGES, LINEAR = 3, 1  # dims of a Conv2d and of a Linear
OPTIONAL = ("bias", "onto")


@dataclass(frozen=True)
class Operator:
    """One operator.

    Args:
        name: In the domain.
        inputs: ``name: type`` of each input; those of :data:`OPTIONAL` may be left out.
        relu: The place in ``geometry`` that says whether ReLU ends the layer.
    """

    name: str
    inputs: dict[str, str]
    relu: int

    @property
    def onto(self) -> int:
        """The number of the input that is added before ReLU."""
        return list(self.inputs).index("onto")


PACKED = {"starts": "int32", "columns": "int16"}
OPERATORS = {
    operator.name: operator
    for operator in (
        Operator("BlockSparse", {"x": "float", "weights": "float", **PACKED, "bias": "float", "onto": "float"}, 10),
        Operator("SignedLinear", {"x": "float", "magnitudes": "float", "minus": "uint8", **PACKED, "onto": "float"}, 3),
        Operator(
            "Int8Sparse",
            {"x": "float", "weights": "int8", **PACKED, "sums": "int32", "scales": "float", "bias": "float"}
            | {"activation": "float", "onto": "float"},
            12,
        ),
    )
}


def package(name: str) -> Any:
    """Return a package of the extra ``onnx``.

    Raises:
        SettingError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SettingError(
            f"exporting to ONNX needs {name}, which is not installed: pip install 'lightning-muws[onnx]'"
        ) from error


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what torch's exporter writes for each of torch's operators of ours (``custom_translation_table``)."""
    sparse, signed, int8 = (_writer(OPERATORS[name]) for name in ("BlockSparse", "SignedLinear", "Int8Sparse"))
    return {
        _overload(block_sparse_op): lambda x, weights, starts, columns, logical, bias, geometry: sparse(
            x, weights, starts, columns, bias, geometry=block_sparse_geometry(geometry, x.shape)
        ),
        _overload(signed_linear_op): lambda x, magnitudes, minus, starts, columns, onto, geometry: signed(
            x, magnitudes, minus, starts, columns, onto, geometry=list(geometry)
        ),
        _overload(int8_sparse_op): lambda x, weights, starts, columns, sums, scales, bias, activation, geometry: int8(
            *(x, weights, starts, columns, sums, scales, bias, activation),
            geometry=[*geometry, LINEAR if geometry[10] else IMAGES],
        ),
    }


def block_sparse_geometry(numbers: Sequence[int], shape: Sequence[Any]) -> list[int]:
    """Return the attribute for a :class:`~lightning_muws.runtime.native.plan.Geometry` and an input's shape.

    Raises:
        SettingError: The layer is in bfloat16.
    """
    g = Geometry(*numbers)
    if g.bfloat16:
        raise SettingError("a bfloat16 layer is not exported to ONNX: call accelerate without dtype=torch.bfloat16")
    return [*g[:11], g.batch_lanes, g.n_in or int(shape[1]), IMAGES]


def _overload(op: Any) -> Callable[..., Any]:
    found: Callable[..., Any] = op._opoverload
    return found


def _writer(operator: Operator) -> Callable[..., Any]:
    """Return a function that writes a node of the operator into the graph that torch's exporter traces."""
    values, defs = package("onnxscript").values, package("onnx").defs
    schema = defs.OpSchema
    kinds = schema.FormalParameterOption
    inputs = [
        schema.FormalParameter(
            name, f"tensor({kind})", param_option=kinds.Optional if name in OPTIONAL else kinds.Single
        )
        for name, kind in operator.inputs.items()
    ]
    output = schema.FormalParameter("y", "tensor(float)")
    attribute = schema.Attribute("geometry", schema.AttrType.INTS)
    described = schema(operator.name, DOMAIN, VERSION, inputs=inputs, outputs=[output], attributes=[attribute])
    writer: Callable[..., Any] = values.Op(values.Opset(DOMAIN, VERSION), operator.name, described)
    return writer
