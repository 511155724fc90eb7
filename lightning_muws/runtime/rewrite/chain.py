"""Turns runs of kernels and the steps between them into native programs: one call of C++ for all of them.

What a program does not know stays a step of torch between two programs. The forward of a module is traced through its
children, so hooks that are registered on them later do not run.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lightning_muws.errors import StateError
from lightning_muws.runtime.kernels.base import Kernel
from lightning_muws.runtime.native.ops import program_op
from lightning_muws.runtime.native.parts import Parts, prepared
from lightning_muws.runtime.native.program import Program
from lightning_muws.runtime.native.steps import Call, Norm, Simple
from lightning_muws.runtime.native.written import tensors_of, written
from lightning_muws.runtime.rewrite.graph import AddInto, FusedForward, fuse_graph, is_relu, trace
from lightning_muws.runtime.rewrite.observe import Example, has_hooks, observe
from lightning_muws.runtime.rewrite.small import is_view, prepare, small_step

PROGRAMS = 4  # kept by a chain, one for each shape: each has an arena
FEWEST_LAYERS = 2  # of a chain


_wants_layers = ContextVar("wants_layers", default=False)


@contextlib.contextmanager
def layer_by_layer() -> Iterator[None]:
    """Let torch.export see the layers of a chain, for formats that have no programs."""
    token = _wants_layers.set(True)
    try:
        yield
    finally:
        _wants_layers.reset(token)


class Link(NamedTuple):
    """A step of a chain.

    Attributes:
        name: Of the kernel or the LayerNorm among the chain's children; empty for a step without weights.
        kind: Empty for a kernel, ``norm`` for a LayerNorm, else of
            :class:`~lightning_muws.runtime.native.steps.Simple`.
        inputs: Numbers of the values that it reads.
        n_in: What the kernel's input has along its channels.
        numbers: As in Simple.
        number: As in Simple.
    """

    name: str
    kind: str
    inputs: tuple[int, ...]
    n_in: int = 0
    numbers: tuple[int, ...] = ()
    number: float = 0.0


class Chain(nn.Module):
    """Kernels, and the steps between them, as one native program for each shape of input.

    Threads may call it at once: each call has its own arena. torch.compile and torch.export see one operator. It runs
    step by step where a program does not apply: for inputs that are no float32 tensors on the CPU, and if NaN or
    infinity reaches a layer of 8 bits.

    Args:
        graph: The steps as torch runs them.
        children: The modules that they call.
        links: The same steps for a program.
        outputs: Numbers of the values to return.
    """

    _programs: dict[tuple[tuple[int, ...], ...], tuple[Program | Parts | None]]  # by the shapes of the inputs
    _buffers_of: list[dict[str, Tensor | None]]  # of each kernel and LayerNorm
    _seen: list[Tensor | None]  # what was in them when the programs were made
    _weights: list[Tensor]
    _pointers: list[int]  # to the weights' numbers, at that time

    def __init__(
        self, graph: fx.Graph, children: Mapping[str, nn.Module], links: Sequence[Link], outputs: Sequence[int]
    ) -> None:
        super().__init__()
        self.steps = fx.GraphModule(dict(children), graph)
        self.links, self.outputs = tuple(links), tuple(outputs)
        self.training = False
        calls = self._calls()
        self.text = "" if calls is None else written(calls, self.outputs)
        self._forget()

    def forward(self, *inputs: Tensor) -> Any:
        """Return the output, or a tuple of them if there are several."""
        if torch.compiler.is_compiling():
            return self._traced(inputs)
        program = self._program(inputs)
        if program is not None:
            outputs = program([x.contiguous() for x in inputs])
            if outputs is not None:
                return outputs[0] if len(outputs) == 1 else tuple(outputs)
        return self.steps.forward(*inputs)

    def _traced(self, inputs: Sequence[Tensor]) -> Any:
        """Return the output of one operator, for torch.compile and torch.export."""
        calls = self._calls() if all(map(_is_plain, inputs)) else None
        if calls is None or not self.text or (torch.compiler.is_exporting() and _wants_layers.get()):
            return self.steps.forward(*inputs)
        large, small = tensors_of(calls)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*large, *small)):
            return self.steps.forward(*inputs)  # they refuse a gradient, which a LayerNorm would have
        outputs = program_op(list(inputs), large, small, self.text)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _program(self, inputs: Sequence[Tensor]) -> Program | Parts | None:
        """Return the program for these inputs, or None if there is none."""
        if not all(map(_is_plain, inputs)):
            return None
        now = itertools.chain.from_iterable(map(dict.values, self._buffers_of))
        same = all(map(operator.is_, now, self._seen))  # no loop of Python: it runs at every call
        if not same or [weights.data_ptr() for weights in self._weights] != self._pointers:
            self._forget()  # the module was moved, or its state replaced
        key = tuple(tuple(x.shape) for x in inputs)
        known = self._programs.get(key)
        if known is not None and known[0] is not None and not known[0].is_current():
            known = None
        if known is None:
            if len(self._programs) >= PROGRAMS:
                self._forget()
            known = self._programs[key] = (self._prepared(key),)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self._weights):
            return None  # the steps one by one refuse a gradient, which a LayerNorm would have
        return known[0]

    def _prepared(self, shapes: tuple[tuple[int, ...], ...]) -> Program | Parts | None:
        calls = self._calls()
        if calls is None:
            return None
        self._buffers_of = [self._tensors(link) for link in self.links if link.name]
        self._seen = [tensor for buffers in self._buffers_of for tensor in buffers.values()]
        self._weights = [
            tensor
            for tensors in self._buffers_of
            for name, tensor in tensors.items()
            if tensor is not None
            and (name == "weights" or tensors.get("weights") is None)  # a LayerNorm has no weights
        ]
        self._pointers = [weights.data_ptr() for weights in self._weights]
        try:
            return prepared(calls, shapes, self.outputs)
        except StateError:  # the steps one by one raise it again, or have another way
            return None

    def _tensors(self, link: Link) -> dict[str, Any]:
        """Return the tensors of a kernel or a LayerNorm by name."""
        module = self.steps.get_submodule(link.name)
        return cast("dict[str, Any]", module._parameters if link.kind == "norm" else module._buffers)

    def _calls(self) -> list[Call] | None:
        """Return the steps with their tensors, or None if a program cannot read them."""
        calls = []
        for link in self.links:
            if not link.name:
                calls.append(Call(Simple(link.kind, link.numbers, link.number), link.inputs))
                continue
            module: Any = self.steps.get_submodule(link.name)
            step = Norm.of(module) if link.kind == "norm" else module.step(link.n_in)
            if step is None or not _are_plain(self._tensors(link).values()):
                return None
            calls.append(Call(step, link.inputs))
        return calls

    def _forget(self) -> None:
        self._programs, self._buffers_of, self._seen, self._weights, self._pointers = {}, [], [], [], []

    def __getstate__(self) -> dict[str, Any]:
        empty: dict[str, Any] = {"_programs": {}, "_buffers_of": [], "_seen": [], "_weights": [], "_pointers": []}
        return {**self.__dict__, **empty}  # they hold addresses


def _is_plain(x: Tensor) -> bool:
    """Return whether a program takes the tensor: others go step by step, where the kernels refuse or convert."""
    needs_gradient = x.requires_grad and torch.is_grad_enabled()
    return x.dtype is torch.float32 and x.device.type == "cpu" and not needs_gradient


def _are_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Return whether a program can read the tensors of a layer: what is float is float32, in order, on the CPU."""
    present = [t for t in tensors if t is not None]
    floats = [t for t in present if t.is_floating_point()]
    return all(t.device.type == "cpu" and t.is_contiguous() for t in present) and all(
        t.dtype in (torch.float32, torch.bfloat16) for t in floats
    )


def chain(model: nn.Module, example: Example) -> int:
    """Replace runs of kernels by chains in every forward that can be traced; return the number of chains.

    It changes the model in place, and fuses ReLUs and sums into kernels as
    :func:`~lightning_muws.runtime.rewrite.graph.fuse` does.
    """
    done: set[nn.Module] = set()
    n_chains = 0
    for module, seen in observe(model, example).items():
        if module in done or not (seen.takes_one and len(module._modules) and len(seen.inputs) == 1):
            continue
        if isinstance(module, Kernel) or has_hooks(module) or (graph := trace(module, through=True)) is None:
            continue
        children = {str(n.target): module.get_submodule(str(n.target)) for n in graph.nodes if n.op == "call_module"}
        prepare(graph, children)
        fuse_graph(graph, children)
        n = _cut(graph, children, seen.inputs[0])
        if n:
            shape = seen.inputs[0].shape[1:]
            module.forward = FusedForward(module, graph, children, shape, any_size=True).forward
            done.update(module.modules())
            n_chains += n
    return n_chains


class _Shapes(fx.Interpreter):
    """Runs a graph, and notes the shape of each step that makes a float32 tensor on the CPU."""

    def __init__(self, graph: fx.Graph, children: Mapping[str, nn.Module]) -> None:
        super().__init__(fx.GraphModule(dict(children), graph))
        self.found: dict[str, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.dtype == torch.float32 and value.device.type == "cpu":
            self.found[n.name] = value.shape
        return value


def _cut(graph: fx.Graph, children: dict[str, nn.Module], x: Tensor) -> int:
    """Replace runs of known steps by chains, in the graph and its children; return how many."""
    interpreter = _Shapes(graph, children)
    interpreter.run(x.clone())  # a step may work in place
    shapes, runs = interpreter.found, list[list[fx.Node]]([[]])
    for node in graph.nodes:
        if node.users and _link(node, children, shapes, {}) is not None:
            runs[-1].append(node)
        elif runs[-1]:
            runs.append([])
    n_chains = 0
    for run in runs:
        _leave_views(graph, children, shapes, run)
        if sum(_kind(node, children) == "" for node in run) >= FEWEST_LAYERS:
            _replace(graph, children, run, shapes, f"chain{n_chains}")
            n_chains += 1
    return n_chains


def _leave_views(
    graph: fx.Graph, children: Mapping[str, nn.Module], shapes: dict[str, torch.Size], run: list[fx.Node]
) -> None:
    """Let what comes after a run make its own views: an output of a chain shares no memory with another."""
    inside = set(run)
    for node in reversed(list(run)):
        if not is_view(small_step(node, children, shapes)):
            continue
        after = [user for user in node.users if user not in inside]
        if after:
            with graph.inserting_after(run[-1]):
                view = graph.node_copy(node)
            shapes[view.name] = shapes[node.name]
            for user in after:
                user.replace_input_with(node, view)
        if not node.users:
            run.remove(node)
            inside.remove(node)
            graph.erase_node(node)


def _replace(
    graph: fx.Graph, children: dict[str, nn.Module], run: list[fx.Node], shapes: Mapping[str, torch.Size], name: str
) -> None:
    """Put a chain in the place of a run of steps."""
    inside = set(run)
    given = list(dict.fromkeys(a for node in run for a in node.all_input_nodes if a not in inside))
    returned = [node for node in run if any(user not in inside for user in node.users)]
    numbers = {node: i for i, node in enumerate([*given, *run])}
    links = [cast("Link", _link(node, children, shapes, numbers)) for node in run]
    steps = fx.Graph()
    copies = {node: steps.placeholder(f"x{i}") for i, node in enumerate(given)}
    for node in run:
        copies[node] = steps.node_copy(node, copies.__getitem__)
    results = tuple(copies[node] for node in returned)
    steps.output(results[0] if len(results) == 1 else results)
    own = {str(node.target): children[str(node.target)] for node in run if node.op == "call_module"}
    renamed = {target: f"m{i}" for i, target in enumerate(own)}  # no dots
    for node in steps.nodes:
        if node.op == "call_module":
            node.target = renamed[str(node.target)]
    links = [link._replace(name=renamed[link.name]) if link.name else link for link in links]
    chain_of = Chain(steps, {renamed[t]: m for t, m in own.items()}, links, [numbers[node] for node in returned])
    children[name] = chain_of
    with graph.inserting_after(run[-1]):
        made = graph.create_node("call_module", name, tuple(given))
    after = made
    for i, node in enumerate(returned):
        value = made
        if len(returned) > 1:
            with graph.inserting_after(after):
                value = after = graph.call_function(operator.getitem, (made, i))
        node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in inside)
    for node in reversed(run):
        graph.erase_node(node)


def _kind(node: fx.Node, children: Mapping[str, nn.Module]) -> str | None:
    """Return what a step is to a program: empty for a kernel, a kind of :class:`Simple`, or None if it is unknown."""
    module = children.get(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, Kernel):
        return ""
    if isinstance(module, AddInto) or (node.op == "call_function" and node.target in (operator.add, torch.add)):
        return "add" if not node.kwargs else None
    if is_relu(node, children):
        return "relu" if node.target is torch.relu_ or not _works_in_place(node, module) else None
    if type(module) is nn.AdaptiveAvgPool2d and not has_hooks(module):
        return "mean" if module.output_size in (1, (1, 1)) else None
    return None


def _works_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Return whether a ReLU that the user wrote may change its input, which others may read."""
    if isinstance(module, nn.ReLU):
        return module.inplace
    return node.target in (F.relu_, "relu_") or bool(node.kwargs.get("inplace")) or len(node.args) != 1


def _link(
    node: fx.Node,
    children: Mapping[str, nn.Module],
    shapes: Mapping[str, torch.Size],
    numbers: Mapping[fx.Node, int],
) -> Link | None:
    """Return the step as a link of a chain, or None if a program cannot run it.

    Args:
        node: The step.
        children: The modules that the graph calls.
        shapes: Of the values that are float32 tensors on the CPU, by the names of their steps.
        numbers: Of the values in the program; may be empty to ask whether there is a link.
    """
    kind = _kind(node, children)
    # a graph has F.relu as a function of two arguments
    inputs = [a for a in node.args if isinstance(a, fx.Node)]
    if kind is None and (small := small_step(node, children, shapes)) is not None:
        name = str(node.target) if small.kind == "norm" else ""
        values = tuple(numbers.get(a, 0) for a in small.inputs)
        return Link(name, small.kind, values, 0, small.numbers, small.number)
    if kind is None or not inputs or any(a.name not in shapes for a in (*inputs, node)):
        return None
    x, y = shapes[inputs[0].name], shapes[node.name]
    if len(inputs) < len(node.args) or (kind == "add" and (len(inputs) != 2 or x != y)):
        return None
    if any(shapes[a.name] != y for a in inputs[1:]) or (kind == "mean" and len(x) != 4) or len(x) < 2:
        return None
    values = tuple(numbers.get(a, 0) for a in inputs)
    if kind:
        return Link("", kind, values)
    n_in = x[-1] if len(x) == 2 else x[1]
    kernel = cast("Kernel", children[str(node.target)])
    step = kernel.step(n_in)
    if step is None or node.kwargs:
        return None
    if step.n_dims == 1:
        n_in = x[-1]
    elif len(x) != step.n_dims + 1:
        return None
    return Link(str(node.target), "", values, n_in)
