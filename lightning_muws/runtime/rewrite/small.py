"""Finds the steps between layers that a program knows: GELU, LayerNorm, attention, pooling, and views.

It also rewrites views whose sizes are computed from the sizes of tensors, and tensors that are taken apart: each
becomes one step of whole numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lightning_muws.runtime.native.views import VIEWS, target
from lightning_muws.runtime.rewrite.observe import has_hooks

SIZES = ("reshape", "view", "unflatten")  # methods whose sizes may be computed
Dim = tuple[fx.Node | None, int, int, int]  # the size of a dimension of a value, times, divided by; or a number


class Small(NamedTuple):
    """A step between layers.

    Attributes:
        kind: Of :class:`~lightning_muws.runtime.native.steps.Simple`, or ``norm``.
        inputs: The values that it reads.
        numbers: As in Simple.
        number: As in Simple.
    """

    kind: str
    inputs: tuple[fx.Node, ...]
    numbers: tuple[int, ...] = ()
    number: float = 0.0


def resized(x: Tensor, *others: Tensor, numbers: Sequence[int]) -> Tensor:
    """Return ``x`` in the shape that :func:`~lightning_muws.runtime.native.views.target` computes."""
    return x.reshape(target(numbers, [one.shape for one in (x, *others)]))


def chunked(x: Tensor, n: int, dim: int, i: int) -> Tensor:
    """Return one of the ``n`` parts that ``chunk`` makes."""
    return x.chunk(n, dim)[i]


def prepare(graph: fx.Graph, children: Mapping[str, nn.Module]) -> None:
    """Rewrite views in place, and remove dropout, which does nothing in eval mode."""
    for node in list(graph.nodes):
        if _is_dropout(node, children) and isinstance(x := _first(node), fx.Node):
            node.replace_all_uses_with(x)
            graph.erase_node(node)
        elif node.op == "call_method" and node.target in SIZES:
            _compute_sizes(graph, node)
        elif _is(node, "unbind", torch.unbind) or _is(node, "chunk", torch.chunk):
            _take_apart(graph, node)
    for node in reversed(list(graph.nodes)):
        if not node.users and _is_size(node):
            graph.erase_node(node)


def _first(node: fx.Node) -> object:
    """Return the first argument by position, or None if there is none."""
    return node.args[0] if node.args else None


def _is(node: fx.Node, method: str, *functions: Callable[..., Any]) -> bool:
    """Return whether a node calls this method of its first argument, or one of these functions."""
    called = node.op == "call_method" and node.target == method
    return (called or (node.op == "call_function" and node.target in functions)) and isinstance(_first(node), fx.Node)


def _is_dropout(node: fx.Node, children: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        child = children[str(node.target)]
        is_one = type(child) in (nn.Dropout, nn.Dropout1d, nn.Dropout2d)
        return is_one and not child.training and not has_hooks(child)
    return node.op == "call_function" and node.target is F.dropout and _given(node, ("training",), 2) == (False,)


def _given(node: fx.Node, names: Sequence[str], first: int, defaults: Sequence[object] = ()) -> tuple[object, ...]:
    """Return arguments by position from ``first`` on or by name; of what is missing, the default (else None)."""
    values = dict(zip(names, defaults, strict=False)) | dict(zip(names, node.args[first:], strict=False)) | node.kwargs
    return tuple(values.get(name) for name in names)


def _is_size(node: fx.Node) -> bool:
    """Return whether a step computes sizes of tensors, and nothing else."""
    if node.op == "call_method":
        return node.target == "size"
    x = _first(node)
    if node.op != "call_function" or not isinstance(x, fx.Node):
        return False
    if node.target is getattr:
        return node.args[1] == "shape"
    return node.target in (operator.getitem, operator.mul, operator.floordiv) and _is_size(x)


def _dim(value: object) -> Dim | None:
    """Return how a size is computed, or None if not by a rule that is known here."""
    if isinstance(value, int):
        return None, 0, value, 1
    if not isinstance(value, fx.Node) or not _is_size(value) or value.kwargs:
        return None
    source, *rest = value.args
    if value.op == "call_method" and len(rest) == 1 and isinstance(rest[0], int):
        return cast("fx.Node", source), rest[0], 1, 1
    if value.target is operator.getitem and isinstance(source, fx.Node) and isinstance(rest[0], int):
        is_all = source.target is getattr or (source.target == "size" and len(source.args) == 1)
        return (cast("fx.Node", source.args[0]), rest[0], 1, 1) if is_all else None
    inside, factor = _dim(source), rest[0] if rest else None
    if inside is None or not isinstance(factor, int) or factor < 1:
        return None
    of, dim, times, by = inside
    if value.target is operator.mul and by == 1:
        return of, dim, times * factor, 1
    return (of, dim, times, by * factor) if value.target is operator.floordiv else None


def _compute_sizes(graph: fx.Graph, node: fx.Node) -> None:
    """Let a view compute its sizes itself, if some of them are computed."""
    first = 2 if node.target == "unflatten" else 1
    sizes = node.args[first:]
    sizes = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    dims = [_dim(size) for size in sizes]
    if node.target == "unflatten" or node.kwargs or all(isinstance(size, int) for size in sizes) or None in dims:
        return
    x = cast("fx.Node", node.args[0])
    known = cast("list[Dim]", dims)
    inputs = list(dict.fromkeys([x, *(of for of, *_ in known if of is not None)]))
    numbers = tuple(n for of, *rest in known for n in (-1 if of is None else inputs.index(of), *rest))
    node.op, node.target = "call_function", resized
    node.args, node.kwargs = tuple(inputs), {"numbers": numbers}


def _take_apart(graph: fx.Graph, node: fx.Node) -> None:
    """Replace the parts of a tensor that is taken apart by one step each, if nothing else reads them."""
    by_number = [u for u in node.users if u.target is operator.getitem and isinstance(u.args[1], int)]
    x = node.args[0]
    is_unbind = _is(node, "unbind", torch.unbind)
    n, dim = (0, *_given(node, ("dim",), 1, (0,))) if is_unbind else _given(node, ("chunks", "dim"), 1, (None, 0))
    if len(by_number) != len(node.users) or not isinstance(dim, int) or not isinstance(n, int):
        return
    for user in by_number:
        i = cast("int", user.args[1])
        user.target, user.args = (torch.select, (x, dim, i)) if is_unbind else (chunked, (x, n, dim, i))
    graph.erase_node(node)


def small_step(node: fx.Node, children: Mapping[str, nn.Module], shapes: Mapping[str, torch.Size]) -> Small | None:
    """Return the step, or None if a program does not know it.

    Args:
        node: The step.
        children: The modules that the graph calls.
        shapes: Of the values that are float32 tensors on the CPU, by the names of their steps.
    """
    if node.name not in shapes or not all(a.name in shapes for a in node.all_input_nodes):
        return None
    if node.op == "call_module":
        return None if len(node.args) != 1 or node.kwargs else _module(node, children[str(node.target)])
    if node.target is F.scaled_dot_product_attention:
        return _attention(node, shapes)
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    n_dims = len(shapes[node.args[0].name])
    return _function(node, n_dims) or _view(node, n_dims)


def _module(node: fx.Node, module: nn.Module) -> Small | None:
    inputs = (cast("fx.Node", node.args[0]),)
    if has_hooks(module):
        return None
    if type(module) is nn.GELU:
        return Small(_gelu(module.approximate), inputs)
    if type(module) is nn.LayerNorm:
        tensors = [t for t in module._parameters.values() if t is not None]
        is_plain = all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors)
        return Small("norm", inputs) if is_plain and len(module.normalized_shape) == 1 else None
    if type(module) is nn.MaxPool2d:
        m = module
        return _pool(inputs, m.kernel_size, m.stride, m.padding, m.dilation, m.return_indices, m.ceil_mode)
    if type(module) is nn.Flatten:
        return Small("flatten", inputs, (module.start_dim, module.end_dim))
    if type(module) is nn.Unflatten and isinstance(module.dim, int):
        return Small("unflatten", inputs, (module.dim, *cast("tuple[int, ...]", module.unflattened_size)))
    return None


def _gelu(approximate: object) -> str:
    return "gelu_tanh" if approximate == "tanh" else "gelu"


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _pool(
    inputs: tuple[fx.Node, ...], window: Any, stride: Any, border: Any, dilation: Any, indices: object, ceil: object
) -> Small | None:
    if indices or ceil or _pair(dilation) != (1, 1):
        return None
    strides = _pair(window if stride is None else stride)
    return Small("pool", inputs, (*_pair(window), *strides, *_pair(border)))


def _function(node: fx.Node, n_dims: int) -> Small | None:
    """Return a step that computes."""
    x = cast("fx.Node", node.args[0])
    if node.target is F.gelu:
        return Small(_gelu(*_given(node, ("approximate",), 1)), (x,))
    if node.target is F.adaptive_avg_pool2d and n_dims == 4:
        return Small("mean", (x,)) if _given(node, ("output_size",), 1)[0] in (1, (1, 1)) else None
    if node.target is F.max_pool2d:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        window, stride, border, dilation, ceil, indices = _given(node, names, 1, (None, None, 0, 1, False, False))
        return _pool((x,), window, stride, border, dilation, indices, ceil)
    return None


def _attention(node: fx.Node, shapes: Mapping[str, torch.Size]) -> Small | None:
    """Return attention without mask, or None."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    *inputs, mask, dropout, causal, scale, grouped = _given(node, names, 0, (None,) * 4 + (0.0, False, None, False))
    if mask is not None or dropout or causal or grouped or not all(isinstance(i, fx.Node) for i in inputs):
        return None
    if scale is not None and not (isinstance(scale, (int, float)) and scale):
        return None
    found = [shapes[i.name] for i in inputs if isinstance(i, fx.Node)]
    if any(len(shape) != 4 or shape[:2] != found[0][:2] for shape in found):
        return None
    return Small("attention", tuple(cast("list[fx.Node]", inputs)), (), 0.0 if scale is None else float(scale))


def _view(node: fx.Node, n_dims: int) -> Small | None:
    """Return a view, or None."""
    x, *rest = node.args
    x = cast("fx.Node", x)
    if node.target is resized:
        inputs = cast("tuple[fx.Node, ...]", node.args)
        return Small("reshape", inputs, cast("tuple[int, ...]", node.kwargs["numbers"]))
    if node.target is chunked:
        return Small("chunk", (x,), cast("tuple[int, ...]", tuple(rest)))
    if node.target is operator.getitem:
        return _indexed(x, rest[0])
    for kind, functions in FUNCTIONS.items():
        if _is(node, kind, *functions):
            return _called(kind, node, x, rest, n_dims)
    return None


FUNCTIONS: Mapping[str, tuple[Callable[..., Any], ...]] = {
    "flatten": (torch.flatten,),
    "unflatten": (torch.unflatten,),
    "permute": (torch.permute,),
    "transpose": (torch.transpose,),
    "select": (torch.select,),
    "reshape": (torch.reshape,),
    "view": (),
    "contiguous": (),
}


def _called(kind: str, node: fx.Node, x: fx.Node, rest: Iterable[object], n_dims: int) -> Small | None:
    if kind == "flatten":
        rest = _given(node, ("start_dim", "end_dim"), 1, (0, -1))
    elif kind == "unflatten":
        rest = _given(node, ("dim", "sizes"), 1)
    elif node.kwargs:
        return None
    numbers = _whole(rest)
    if numbers is None:
        return None
    if kind in ("reshape", "view"):
        return Small("reshape", (x,), tuple(n for size in numbers for n in (-1, 0, size, 1)))
    n_wanted = {"flatten": 2, "transpose": 2, "select": 2, "permute": n_dims, "contiguous": 0}
    return Small(kind, (x,), numbers) if len(numbers) == n_wanted.get(kind, len(numbers)) else None


def _whole(values: Iterable[object]) -> tuple[int, ...] | None:
    """Return whole numbers, of which some may be in tuples; None if anything else is among them."""
    found: list[int] = []
    for value in values:
        if isinstance(value, (tuple, list)):
            inside = _whole(value)
            if inside is None:
                return None
            found += inside
        elif isinstance(value, int) and not isinstance(value, bool):
            found.append(value)
        else:
            return None
    return tuple(found)


def _indexed(x: fx.Node, index: object) -> Small | None:
    """Return one whole number along one dimension, such as ``x[0]`` or ``x[:, 0]``."""
    places = index if isinstance(index, tuple) else (index,)
    if not places or not isinstance(places[-1], int) or isinstance(places[-1], bool):
        return None
    if any(place != slice(None) for place in places[:-1]):
        return None
    return Small("select", (x,), (len(places) - 1, places[-1]))


def is_view(small: Small | None) -> bool:
    """Return whether a step computes nothing."""
    return small is not None and small.kind in VIEWS
