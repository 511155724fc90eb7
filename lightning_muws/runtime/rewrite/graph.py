"""Looks into the forward of small modules: folds batch norm into the layer before it, and ReLU and sums into kernels.

Only a module whose forward takes one tensor and can be traced is changed. Its class, attributes and children stay; its
``forward`` runs the traced steps while the input is shaped as the example was, and is the old one for any other.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from lightning_muws.runtime.kernels.base import LAYER_TYPES, Kernel
from lightning_muws.runtime.rewrite.observe import Calls, Example, has_hooks, observe, replace_module

NORMS = {nn.Linear: nn.BatchNorm1d, nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d}
ADDITIONS = (operator.add, operator.iadd, torch.add)
ADD_INTO = "add_into"  # its name in a graph
RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)


class _OneLevel(fx.Tracer):
    """Traces a forward down to its children; plain Sequentials are looked through."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) is not nn.Sequential or has_hooks(m)


def trace(module: nn.Module) -> fx.Graph | None:
    """Return the steps of the module's forward, or None where they depend on values or use tensors of its own."""
    try:
        graph = _OneLevel().trace(module)
    except Exception:  # a forward is anybody's code; whatever it raises, it is not traced
        return None
    if any(node.op == "get_attr" for node in graph.nodes) or sum(n.op == "placeholder" for n in graph.nodes) != 1:
        return None
    return graph


def fold(model: nn.Module, example: Example) -> int:
    """Fold each batch norm in eval mode into the Linear or convolution whose only reader it is; return how many.

    The model is changed in place. Both must have run once in the example.
    """
    calls, n_folded = observe(model, example), 0
    for module in _traceable(calls):
        graph = trace(module)
        for node in graph.nodes if graph else ():
            if node.op != "call_module" or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
                continue
            before = node.args[0]
            if before.op != "call_module" or len(before.users) != 1:
                continue
            layer, norm = module.get_submodule(str(before.target)), module.get_submodule(str(node.target))
            if _folds(layer, norm, calls):
                replace_module(model, layer, _folded(layer, norm))
                replace_module(model, norm, nn.Identity())
                n_folded += 1
    return n_folded


def _folds(layer: nn.Module, norm: nn.Module, calls: Mapping[nn.Module, Calls]) -> bool:
    """Return whether the norm only scales and shifts the layer's outputs, on the one path that the example took."""
    if type(layer) not in LAYER_TYPES or type(norm) is not NORMS[type(layer)]:
        return False
    if norm.training or norm.running_mean is None or has_hooks(layer) or has_hooks(norm):
        return False
    seen = (calls.get(layer), calls.get(norm))
    if any(c is None or c.n != 1 for c in seen):
        return False
    return not isinstance(layer, nn.Linear) or all(x.dim() == 2 for x in calls[layer].inputs)


def _folded(layer: nn.Module, norm: nn.Module) -> nn.Module:
    fuse: Any = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
    folded: nn.Module = fuse(layer, norm)
    return folded


def _traceable(calls: Mapping[nn.Module, Calls]) -> list[nn.Module]:
    """Return the modules with children whose forward takes one tensor, and did."""
    return [m for m, seen in calls.items() if seen.takes_one and len(m._modules) and not isinstance(m, Kernel)]


class FusedForward(nn.Module):
    """The forward of a module as traced steps, for inputs of the shape that was traced.

    Args:
        module: Whose forward it is; it keeps its own.
        graph: The traced steps.
        children: The modules that they call.
        shape: Of the example without its batch; other shapes go the old way.
    """

    def __init__(
        self, module: nn.Module, graph: fx.Graph, children: Mapping[str, nn.Module], shape: torch.Size
    ) -> None:
        super().__init__()
        self.__dict__["module"] = module  # not a child of its own part
        self.shape = shape
        names = {name: f"m{i}" for i, name in enumerate(children)}  # without dots: one look-up a call, not three
        for node in graph.nodes:
            if node.op == "call_module":
                node.target = names[str(node.target)]
        self.steps = fx.GraphModule({names[name]: child for name, child in children.items()}, graph)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the module's forward returns."""
        if x.shape[1:] == self.shape:
            return cast("Tensor", self.steps.forward(x))  # its __call__ costs as much as a small layer
        return cast("Tensor", cast("Any", type(self.module)).forward(self.module, x))


def fuse(model: nn.Module, example: Example) -> int:
    """Let kernels apply the ReLU that follows them, and sums and ReLUs work in place; return how many steps went.

    The model is changed in place. What a kernel packed is shared with its twin that applies ReLU.
    """
    n_fused = 0
    for module, seen in observe(model, example).items():
        if not (seen.takes_one and len(module._modules) and len(seen.inputs) == 1) or has_hooks(module):
            continue
        if isinstance(module, Kernel) or (graph := trace(module)) is None:
            continue
        children = {str(n.target): module.get_submodule(str(n.target)) for n in graph.nodes if n.op == "call_module"}
        n = _fuse(graph, children)
        if n:
            module.forward = FusedForward(module, graph, children, seen.inputs[0].shape[1:]).forward
            n_fused += n
    return n_fused


def keep_batch_last(model: nn.Module) -> int:
    """Let kernels pass a batch on with its images side by side; return how many do. Changes the model in place."""
    twins = [(m, twin) for m in model.modules() if isinstance(m, Kernel) and (twin := m.with_batch_last()) is not None]
    for kernel, twin in twins:
        replace_module(model, kernel, twin)
    return len(twins)


class AddInto(nn.Module):
    """Adds in the first one's memory, where that has the sum's shape and dtype."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``a + b``."""
        return a.add_(b) if a.shape == b.shape and a.dtype == b.dtype else a + b


def _fuse(graph: fx.Graph, children: dict[str, nn.Module]) -> int:
    """Rewrite the graph in place, and return how many steps were saved or work in place."""
    n_fused = 0
    for node in list(graph.nodes):
        if node.op == "call_module" and type(children[str(node.target)]) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in list(graph.nodes):
        if _is_relu(node, children):
            n_fused += _fuse_relu(graph, node, children)
        elif node.op == "call_function" and node.target in ADDITIONS and len(node.args) == 2 and not node.kwargs:
            n_fused += _add_onto(graph, node, children) or _add_in_place(node, children)
    return n_fused


def _fuse_relu(graph: fx.Graph, node: fx.Node, children: dict[str, nn.Module]) -> bool:
    """Let the kernel before a ReLU apply it, or the ReLU work in place; return whether it can."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or len(source.users) > 1:
        return False
    kernel = children.get(str(source.target)) if source.op == "call_module" else None
    if isinstance(kernel, Kernel):
        children[f"{source.target}_relu"] = kernel.with_relu()
        source.target = f"{source.target}_relu"
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        return True
    if _is_fresh(source, children):
        node.op, node.target, node.args, node.kwargs = "call_function", torch.relu_, (source,), {}
        return True
    return False


def _add_in_place(node: fx.Node, children: dict[str, nn.Module]) -> bool:
    """Let a sum use the memory of an addend that nothing else reads; return whether there is one."""
    a, b = node.args
    if not (_is_fresh(a, children) and len(cast("fx.Node", a).users) == 1):
        a, b = b, a
    if not (_is_fresh(a, children) and len(cast("fx.Node", a).users) == 1) or not isinstance(b, fx.Node) or a is b:
        return False
    node.op, node.target, node.args = "call_module", ADD_INTO, (a, b)
    children[ADD_INTO] = AddInto()
    return True


def _add_onto(graph: fx.Graph, node: fx.Node, children: Mapping[str, nn.Module]) -> bool:
    """Let the last kernel before a sum add its outputs to the other addend; return whether it can."""
    order = {step: i for i, step in enumerate(graph.nodes)}
    addends = [a for a in node.args if isinstance(a, fx.Node)]
    if len(addends) != 2 or addends[0] is addends[1]:
        return False
    other, last = sorted(addends, key=order.__getitem__)
    kernel = children.get(str(last.target)) if last.op == "call_module" else None
    if not isinstance(kernel, Kernel) or not kernel.can_add or kernel.relu:  # it would add before its ReLU
        return False
    if len(last.users) != 1 or len(last.args) != 1 or last.kwargs:
        return False
    last.args = (*last.args, other)
    node.replace_all_uses_with(last)
    graph.erase_node(node)
    return True


def _is_relu(node: fx.Node, children: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(children[str(node.target)]) is nn.ReLU
    return (node.op == "call_function" and node.target in RELUS) or (
        node.op == "call_method" and node.target in ("relu", "relu_")
    )


def _is_fresh(value: object, children: Mapping[str, nn.Module]) -> bool:
    """Return whether the step's output is in memory that nothing else looks at."""
    if not isinstance(value, fx.Node):
        return False
    if value.op == "call_module":
        child = children[str(value.target)]
        return isinstance(child, (Kernel, AddInto)) or (type(child) in LAYER_TYPES and not has_hooks(child))
    return value.op == "call_function" and value.target in (*ADDITIONS, torch.relu_)
