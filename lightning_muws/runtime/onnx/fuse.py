"""Makes the graph of an ONNX model shorter: sums and ReLUs move into the layer before, Linears take any rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_muws.runtime.onnx.operators import DOMAIN, IMAGES, LINEAR, OPERATORS, Operator, package

Node = Any  # onnx_ir.Node
Value = Any  # onnx_ir.Value


def fuse(graph: Any) -> None:
    """Shorten the graph in place.

    Args:
        graph: An ``onnx_ir.Graph`` with nodes of our domain.
    """
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type == "BlockSparse":
            _flatten(graph, node)
    for node in list(graph):
        if node.domain == "" and node.op_type == "Add":
            _add_onto(graph, node)
        elif node.domain == "" and node.op_type == "Relu":
            _end_in_relu(graph, node)


def geometry_of(node: Node) -> list[int]:
    """Return the numbers of the layer."""
    return list(node.attributes["geometry"].as_ints())


def layer(operator: str, inputs: Sequence[Value | None], geometry: Sequence[int]) -> Node:
    """Return a node of our domain."""
    given = list(inputs)
    while given[-1] is None:
        given.pop()
    return package("onnx_ir").node(operator, given, attributes={"geometry": list(geometry)}, domain=DOMAIN)


def replace(graph: Any, old: Sequence[Node], new: Sequence[Node]) -> None:
    """Put nodes in the place of others; the output of the last new one stands for that of the last old one."""
    package("onnx_ir").convenience.replace_nodes_and_values(
        graph, old[-1], old, new, [old[-1].outputs[0]], [new[-1].outputs[0]]
    )


def constant(value: Value) -> Any:
    """Return what a value holds as a numpy array, or None if it is no constant."""
    found = None if value is None else package("onnx_ir").convenience.get_const_tensor(value)
    return None if found is None else found.numpy()


def _only_user(value: Value) -> Node | None:
    """Return the node that reads a value, or None if it is read twice, or is an output."""
    users = [user for user, _ in value.uses()]
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def _flatten(graph: Any, node: Node) -> None:
    """Let a Linear read ``(n, in)``, where torch's operator is given ``(n, in, 1, 1)``."""
    geometry = geometry_of(node)
    before = node.inputs[0].producer()
    is_linear = geometry[1:8] == [1, 1, 1, 1, 0, 0, 1] and geometry[-1] == IMAGES
    if not is_linear or before is None or before.op_type != "Unsqueeze":
        return
    axes = constant(before.inputs[1])
    if axes is None or sorted(axes.tolist()) != [2, 3]:
        return
    after, nodes = node, [node]
    for _ in range(2):  # both dimensions of size 1 are selected away
        after = _only_user(after.outputs[0])
        if after is None or after.op_type != "Gather" or after.inputs[0] is not nodes[-1].outputs[0]:
            return
        if after.attributes["axis"].as_int() != 2 or constant(after.inputs[1]) != 0:
            return
        nodes.append(after)
    replace(graph, nodes, [layer(node.op_type, [before.inputs[0], *node.inputs[1:]], [*geometry[:-1], LINEAR])])


def _add_onto(graph: Any, add: Node) -> None:
    """Let the layer before a sum add the other addend as it writes."""
    for value, other in (add.inputs, add.inputs[::-1]):
        made_by = value.producer()
        operator = _ours(made_by)
        if operator is None or _only_user(value) is not add or value is other or not _same_shape(value, other):
            continue
        inputs = [*made_by.inputs, *[None] * (len(operator.inputs) - len(made_by.inputs))]
        geometry = geometry_of(made_by)
        if inputs[operator.onto] is None and not geometry[operator.relu]:  # it would add before its ReLU
            inputs[operator.onto] = other
            replace(graph, [made_by, add], [layer(operator.name, inputs, geometry)])
            return


def _end_in_relu(graph: Any, relu: Node) -> None:
    """Let the layer before a ReLU apply it."""
    made_by = relu.inputs[0].producer()
    operator = _ours(made_by)
    if operator is None or _only_user(relu.inputs[0]) is not relu:
        return
    geometry = geometry_of(made_by)
    geometry[operator.relu] = 1
    replace(graph, [made_by, relu], [layer(operator.name, made_by.inputs, geometry)])


def _ours(node: Node | None) -> Operator | None:
    return OPERATORS[node.op_type] if node is not None and node.domain == DOMAIN else None


def _same_shape(a: Value, b: Value) -> bool:
    """Return whether both shapes are known and equal."""
    return a.shape is not None and b.shape is not None and a.shape == b.shape
