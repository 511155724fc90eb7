"""Folds batch norm into the layer before it, and fuses ReLU and sums into kernels, in every forward that can be traced.

It changes only modules whose forward takes one tensor and can be traced. Such a module keeps its class, attributes and
children. Its new ``forward`` runs the traced steps for inputs of the example's shape, and the original for any other.

Fusion asks of a kernel only what :class:`~lightning_muws.runtime.kernels.base.Kernel` lists.
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
    """Traces a forward down to its children; the layers of a plain Sequential count as children."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) is not nn.Sequential or has_hooks(m)


class _Through(fx.Tracer):
    """Traces a forward down to kernels and torch's own modules."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Kernel) or has_hooks(m) or super().is_leaf_module(m, module_qualified_name)


def trace(module: nn.Module, through: bool = False) -> fx.Graph | None:
    """Return the steps of the module's forward, or None if they depend on values or use the module's own tensors.

    Args:
        module: The module.
        through: Trace the forwards of its children too, down to kernels and torch's own modules.
    """
    try:
        graph = (_Through() if through else _OneLevel()).trace(module)
    except Exception:  # a forward is arbitrary code: whatever it raises, it cannot be traced
        return None
    if any(node.op == "get_attr" for node in graph.nodes) or sum(n.op == "placeholder" for n in graph.nodes) != 1:
        return None
    return graph


def fold(model: nn.Module, example: Example) -> int:
    """Fold each batch norm in eval mode into the Linear or convolution that only it reads; return how many.

    It changes the model in place. Both must run exactly once in the example.
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
    """Return whether the norm only scales and shifts the layer's outputs, and both ran once in the example."""
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
    """Return the modules with children whose forward takes one tensor and got one."""
    return [m for m, seen in calls.items() if seen.takes_one and len(m._modules) and not isinstance(m, Kernel)]


class FusedForward(nn.Module):
    """The forward of a module as traced steps, for inputs of the traced shape or, if so asked, of any size.

    Args:
        module: The module, which keeps its own forward.
        graph: The traced steps.
        children: The modules that the steps call.
        shape: Shape of the example without its batch; other shapes use the original forward.
        any_size: Use the steps for every input of as many dimensions. They hold for it: a forward that depends on sizes
            cannot be traced.
    """

    def __init__(
        self,
        module: nn.Module,
        graph: fx.Graph,
        children: Mapping[str, nn.Module],
        shape: torch.Size,
        any_size: bool = False,
    ) -> None:
        super().__init__()
        self.__dict__["module"] = module  # no child: it contains this one
        self.shape, self.any_size = shape, any_size
        names = {name: f"m{i}" for i, name in enumerate(children)}  # no dots: one look-up per call, not three
        for node in graph.nodes:
            if node.op == "call_module":
                node.target = names[str(node.target)]
        self.steps = fx.GraphModule({names[name]: child for name, child in children.items()}, graph)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the module's forward returns."""
        if x.shape[1:] == self.shape or (self.any_size and x.dim() == len(self.shape) + 1):
            return cast("Tensor", self.steps.forward(x))  # its __call__ costs as much as a small layer
        return cast("Tensor", cast("Any", type(self.module)).forward(self.module, x))


def fuse(model: nn.Module, example: Example) -> int:
    """Let kernels apply the ReLU that follows them, and sums and ReLUs work in place; return the number of changes.

    It changes the model in place. A kernel and its twin with ReLU share their buffers.
    """
    n_fused = 0
    for module, seen in observe(model, example).items():
        if not (seen.takes_one and len(module._modules) and len(seen.inputs) == 1) or has_hooks(module):
            continue
        if isinstance(module, Kernel) or (graph := trace(module)) is None:
            continue
        children = {str(n.target): module.get_submodule(str(n.target)) for n in graph.nodes if n.op == "call_module"}
        n = fuse_graph(graph, children)
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
    """Adds into the first tensor if it has the sum's shape and dtype."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``a + b``."""
        return a.add_(b) if a.shape == b.shape and a.dtype == b.dtype else a + b


def fuse_graph(graph: fx.Graph, children: dict[str, nn.Module]) -> int:
    """Fuse in a graph and its children, in place; return how many steps were removed or work in place."""
    n_fused = 0
    for node in list(graph.nodes):
        child = children[str(node.target)] if node.op == "call_module" else None
        if type(child) is nn.Identity and not has_hooks(child):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in list(graph.nodes):
        if is_relu(node, children):
            n_fused += _fuse_relu(graph, node, children)
        elif node.op == "call_function" and node.target in ADDITIONS and len(node.args) == 2 and not node.kwargs:
            n_fused += _add_onto(graph, node, children) or _add_in_place(node, children)
    return n_fused


def _fuse_relu(graph: fx.Graph, node: fx.Node, children: dict[str, nn.Module]) -> bool:
    """Let the kernel before a ReLU apply it, or the ReLU work in place; return whether either is possible."""
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
    """Let a sum overwrite an addend that nothing else reads; return whether there is one."""
    a, b = node.args
    if not (_is_fresh(a, children) and len(cast("fx.Node", a).users) == 1):
        a, b = b, a
    if not (_is_fresh(a, children) and len(cast("fx.Node", a).users) == 1) or not isinstance(b, fx.Node) or a is b:
        return False
    node.op, node.target, node.args = "call_module", ADD_INTO, (a, b)
    children[ADD_INTO] = AddInto()
    return True


def _add_onto(graph: fx.Graph, node: fx.Node, children: Mapping[str, nn.Module]) -> bool:
    """Let the kernel that runs last before a sum add the other addend; return whether it can."""
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


def is_relu(node: fx.Node, children: Mapping[str, nn.Module]) -> bool:
    """Return whether a step is a ReLU, in place or not."""
    if node.op == "call_module":
        child = children[str(node.target)]
        return type(child) is nn.ReLU and not has_hooks(child)
    return (node.op == "call_function" and node.target in RELUS) or (
        node.op == "call_method" and node.target in ("relu", "relu_")
    )


def _is_fresh(value: object, children: Mapping[str, nn.Module]) -> bool:
    """Return whether nothing else holds the memory of the step's output."""
    if not isinstance(value, fx.Node):
        return False
    if value.op == "call_module":
        child = children[str(value.target)]
        return isinstance(child, (Kernel, AddInto)) or (type(child) in LAYER_TYPES and not has_hooks(child))
    return value.op == "call_function" and value.target in (*ADDITIONS, torch.relu_)
