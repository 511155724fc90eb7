"""Times the whole network in its dense and its accelerated forms, and picks the one to return."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muws.runtime.kernels import dense
from lightning_muws.runtime.kernels.base import LAYER_TYPES, Kernel, channels_last
from lightning_muws.runtime.rewrite.chain import chain
from lightning_muws.runtime.rewrite.graph import fuse, keep_batch_last
from lightning_muws.runtime.rewrite.observe import (
    FAILURES,
    Example,
    Root,
    has_hooks,
    output_error,
    replace_module,
    tensors_in,
)
from lightning_muws.runtime.timing import Timing, gain, race

FASTER = 1.02  # a smaller gain is noise: the model is returned unchanged
Form = tuple[Callable[..., Any], Example]


@dataclass(frozen=True)
class Verdict:
    """The result of timing the whole network.

    Args:
        times: Median seconds of each form.
        errors: Relative error of each form.
        best_dense: The fastest dense form.
        chosen: The accelerated form that won; ``dense`` if none did.
        speedup: Seconds of the best dense form over those of the chosen one; 1 if that is dense.
        tried: The speedup of the best accelerated form, chosen or not.
        refused: Why a form was not timed, by form.
    """

    times: dict[str, float]
    errors: dict[str, float]
    best_dense: str
    chosen: str
    speedup: float
    tried: float
    refused: dict[str, str]


def dense_forms(given: Callable[..., Any], folded: nn.Module, example: Example) -> dict[str, Form]:
    """Return the dense forms: the network as given, folded, in channels last, and prepacked by oneDNN."""
    forms: dict[str, Form] = {"dense": (given, example), "folded": (folded, example)}
    convolves = any(isinstance(m, nn.Conv2d) for m in folded.modules())
    if convolves:
        last = channels_last(copy.deepcopy(folded))
        forms["channels_last"] = last, example.map(_channels_last)
    packed = copy.deepcopy(folded)
    layers = [m for m in packed.modules() if type(m) in LAYER_TYPES and not has_hooks(m)]
    kernels = [(m, k) for m in layers if (k := dense.prepacked(m, keep_layout=False)) is not None]
    if kernels:
        for layer, kernel in kernels:
            replace_module(packed, layer, kernel)
        fuse(packed, example)
        forms["onednn"] = packed, example
        if convolves:
            forms["onednn_channels_last"] = packed, example.map(_channels_last)
    return forms


def fast_forms(
    root: Root, example: Example, native: Mapping[str, Kernel] | None = None
) -> dict[str, tuple[Root, Example]]:
    """Return the accelerated forms: as it is, with fused steps, with the images of a batch side by side, and in chains.

    Args:
        root: The network with its layers swapped.
        example: The example input.
        native: Kernels that can be steps of a chain, for layers that another kernel computes, by name in ``root``. If
            there are any, one form more has them: a longer chain may gain more than a layer loses.
    """
    forms = {"fast": (root, example)}
    with suppress(*FAILURES):  # a form that raises is left out; judge() reports why the first one does
        fused = copy.deepcopy(root)
        if fuse(fused, example):
            forms["fast_fused"] = fused, example
    with suppress(*FAILURES):
        batch_last = copy.deepcopy(root)
        if example.tensors[0].shape[:1] > (1,) and keep_batch_last(batch_last) > 1:
            fuse(batch_last, example)
            forms["fast_batch_last"] = batch_last, example
    for name, swapped in (("fast_chained", {}), ("fast_native", native or {})):
        if name == "fast_native" and not swapped:
            continue
        with suppress(*FAILURES):
            chained = copy.deepcopy(root)
            for layer, kernel in swapped.items():
                replace_module(chained, chained.get_submodule(layer), kernel)
            if chain(chained, example):
                fuse(chained, example)
                forms[name] = chained, example
    return forms


def bf16_form(folded: nn.Module, example: Example) -> dict[str, Form]:
    """Return the network in bfloat16, for comparison; nothing if it is not float32."""
    if any(p.dtype != torch.float32 for p in folded.parameters()):
        return {}
    half = copy.deepcopy(folded).to(torch.bfloat16)
    convolves = any(isinstance(m, nn.Conv2d) for m in half.modules())
    half = channels_last(half) if convolves else half
    return {"bf16": (half, example.map(lambda x: _channels_last(x.to(torch.bfloat16) if x.is_floating_point() else x)))}


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def expected_output(model: nn.Module, example: Example) -> list[Tensor]:
    """Return the output in float64, or in the model's own dtype if its forward does not run in float64."""
    try:
        double = copy.deepcopy(model).double()
        return tensors_in(example.map(lambda x: x.double() if x.is_floating_point() else x)(double))
    except FAILURES:
        return tensors_in(example(model))


def judge(
    dense_ones: Mapping[str, Form],
    fast_ones: Mapping[str, Form],
    others: Mapping[str, Form],
    expected: list[Tensor],
    clock: Callable[[], float],
    timing: Timing,
    limit: float,
    check: tuple[Example, list[Tensor]] | None = None,
) -> Verdict:
    """Time the forms and return the winner.

    A form that raises is not timed, nor is one whose error exceeds both ``limit`` and four times the given model's.
    ``check``, if given, is another input and its expected output, for the errors of accelerated forms.
    """
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    right: dict[str, Form] = {}
    for name, form in {**dense_ones, **fast_ones, **others}.items():
        try:
            example, wanted = check if check is not None and name in fast_ones else (form[1], expected)
            errors[name] = output_error(example(form[0]), wanted)
        except FAILURES as error:
            if name == "dense":
                raise
            refused[name] = f"raised {type(error).__name__}: {error}"
            continue
        if name == "dense" or name in others or errors[name] <= max(limit, 4 * errors["dense"]):
            right[name] = form
        else:
            refused[name] = f"has a relative error of {errors[name]:.1e}"
    times = race(_tasks({n: f for n, f in right.items() if n in dense_ones}), clock, timing)
    best = min(times, key=lambda name: median(times[name]))
    finalists = {n: f for n, f in right.items() if n == best or n not in dense_ones}
    if any(name in fast_ones for name in finalists):
        times |= race(_tasks(finalists), clock, timing, keep=list(finalists))
    chosen, tried = pick_form(times, best, list(fast_ones))
    return Verdict(
        times={name: median(values) for name, values in times.items() if values},
        errors=errors,
        best_dense=best,
        chosen=chosen,
        speedup=tried if chosen != "dense" else 1.0,
        tried=tried,
        refused=refused,
    )


def pick_form(times: Mapping[str, Sequence[float]], best_dense: str, fast: Sequence[str]) -> tuple[str, float]:
    """Return the fastest accelerated form and its gain over the best dense one; ``dense`` if it gains nothing.

    Example:
        >>> pick_form({"dense": [3.0, 3.0], "onednn": [2.0, 2.0], "fast": [1.0, 1.0]}, "onednn", ["fast"])
        ('fast', 2.0)
        >>> pick_form({"dense": [3.0, 3.0], "onednn": [1.0, 1.0], "fast": [1.0, 1.0]}, "onednn", ["fast"])
        ('dense', 1.0)
    """
    timed = [name for name in fast if times.get(name)]
    if not timed:
        return "dense", 1.0
    fastest = min(timed, key=lambda name: median(times[name]))
    gained = gain(times[best_dense], times[fastest])
    return (fastest if gained >= FASTER else "dense"), gained


def _tasks(forms: Mapping[str, Form]) -> dict[str, Callable[[], object]]:
    return {name: lambda form=form: form[1](form[0]) for name, form in forms.items()}  # type: ignore[misc]
