"""Swaps layers for the fastest measured way to compute them, and keeps dense where dense wins."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muws.errors import SettingError
from lightning_muws.runtime.kernels import DENSE, KERNELS
from lightning_muws.runtime.kernels.base import LAYER_TYPES, Layer
from lightning_muws.runtime.measure.layer import ERRORS, Choice, build_all, choose, describe, left_alone
from lightning_muws.runtime.measure.network import bf16_form, dense_forms, expected_output, fast_forms, judge
from lightning_muws.runtime.measure.report import LayerSpeed, Machine, SpeedReport
from lightning_muws.runtime.measure.stored import void
from lightning_muws.runtime.rewrite.graph import fold
from lightning_muws.runtime.rewrite.observe import Calls, Example, Root, inference, observe
from lightning_muws.runtime.rewrite.observe import replace as replace_module
from lightning_muws.runtime.shapes import find_block_shape
from lightning_muws.runtime.timing import Timing, clock_for

LAYER_TIMING = Timing(rounds=9, least_rounds=3, budget_s=0.5)
NETWORK_TIMING = Timing(rounds=15, least_rounds=5, budget_s=4.0, sample_s=0.01)
NETWORK_FACTOR = 10.0  # a network's error may be this many times a layer's
PREFIX = "_orig_mod."  # of names inside torch.compile's wrapper


@dataclass(frozen=True)
class Settings:
    """What was asked of :func:`accelerate`, checked.

    Args:
        min_gain: How many times faster than dense a kernel must be.
        dtype: The lowest precision allowed; empty: the model's.
        kernels: Names of the kernels that may be tried.
    """

    min_gain: float = 1.1
    dtype: str = ""
    kernels: tuple[str, ...] = tuple(KERNELS)

    def __post_init__(self) -> None:
        gain: object = self.min_gain  # anything may have been given
        if isinstance(gain, bool) or not isinstance(gain, (int, float)) or not gain >= 1:
            raise SettingError(f"min_gain={self.min_gain!r} is not allowed: give a number of at least 1, such as 1.1")
        if self.dtype not in ("", "float32", "bfloat16"):
            raise SettingError(f"dtype={self.dtype!r} is not allowed: give None, torch.float32 or torch.bfloat16")
        if unknown := [name for name in self.kernels if name not in KERNELS]:
            raise SettingError(f"kernels={unknown!r} are not in the table; it has {', '.join(KERNELS)}")


def accelerate(
    model: nn.Module,
    example_input: object,
    min_gain: float = 1.1,
    dtype: torch.dtype | None = None,
    kernels: Sequence[str] | None = None,
    plan: SpeedReport | str | Path | None = None,
    block_shapes: Mapping[str, tuple[int, int]] | None = None,
) -> tuple[nn.Module, SpeedReport]:
    """Return a copy of the model that is as fast as measurements on this machine can make it, and the report.

    Each Linear, Conv1d and Conv2d that the example comes through is built with every kernel that applies, checked
    against float64, and timed; the fastest stays. The whole network is then timed against its best dense form. If it
    is not faster, a copy of the model as it was comes back, and the report says so. The model given is not changed.

    The copy is for inference. Its speed is that of inputs shaped as the example, on this machine with this number of
    threads; it is right for any. ``torch.export.save`` and AOTInductor can store it; a process that loads such a file
    runs ``import lightning_muws.ops`` first, which registers the operators.

    Args:
        model: In eval mode, on any device; a compiled one is looked into.
        example_input: A tensor, a tuple of arguments, or a dict of keyword arguments, as the model is called in use.
        min_gain: How many times faster than the best dense form of its layer a kernel must be.
        dtype: ``torch.bfloat16`` lets kernels of that precision win; otherwise they are only compared with.
        kernels: Names of the kernels to try (``lightning_muws.runtime.kernels.KERNELS``); all, where not given.
        plan: A report, or the path of a saved one, whose choices are used again without timing. It is void, with a
            warning, on another machine, torch, number of threads, input shape or with other weights pruned.
        block_shapes: Block shapes by the name of the weight (``features.0.weight``), as a plan or a file gives them;
            found from the zeros where not given.

    Returns:
        The accelerated copy, and the report.

    Raises:
        SettingError: A setting is not allowed, the model is in training mode, or a name in ``block_shapes`` is none of
            its weights.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 8)).eval()
        >>> _ = model[0].weight.data[:448].zero_()
        >>> fast, report = accelerate(model, torch.randn(32, 512))
        >>> torch.testing.assert_close(fast(torch.ones(3, 512)), model(torch.ones(3, 512)))
    """
    settings = Settings(
        min_gain,
        "" if dtype is None else str(dtype).removeprefix("torch."),
        tuple(KERNELS if kernels is None else kernels),
    )
    source = getattr(model, "_orig_mod", model)
    if source.training:
        raise SettingError(
            "the model is in training mode, where batch norm and dropout depend on the batch: call model.eval() first"
        )
    _check_names(source, block_shapes or {})
    with inference():
        return _accelerate(model, source, Example.of(example_input), settings, plan, block_shapes or {})


def _check_names(source: nn.Module, block_shapes: Mapping[str, tuple[int, int]]) -> None:
    names = {name.removeprefix(PREFIX) for name, _ in source.named_parameters(remove_duplicate=False)}
    if unknown := [name for name in block_shapes if name.removeprefix(PREFIX) not in names]:
        raise SettingError(
            f"block_shapes names {unknown[:3]!r}, which the model does not have: give its weights' names"
        )


def _accelerate(
    model: nn.Module,
    source: nn.Module,
    example: Example,
    settings: Settings,
    plan: SpeedReport | str | Path | None,
    block_shapes: Mapping[str, tuple[int, int]],
) -> tuple[nn.Module, SpeedReport]:
    stored = SpeedReport.load(plan) if isinstance(plan, (str, Path)) else plan
    if not isinstance(stored, (SpeedReport, type(None))):
        raise SettingError(
            f"plan is a {type(plan).__name__}, no speed report: give a report or the path of a saved one"
        )
    root = Root(copy.deepcopy(source))
    n_folded = fold(root, example)
    calls, device = observe(root, example), _device(root)
    report = SpeedReport(
        machine=Machine.here(device),
        inputs=tuple(tuple(x.shape) for x in example.tensors),
        min_gain=settings.min_gain,
        dtype=settings.dtype,
        layers=(),
        times={},
        errors={},
        best_dense="dense",
        chosen="dense",
        speedup=1.0,
        n_folded=n_folded,
    )
    layers = _layers(root)
    if stored is not None:
        why = void(stored, report, layers, calls)
        if not why:
            return _apply(source, root, example, layers, calls, stored)
        warnings.warn(f"the stored choice of kernels is void, as {why}; everything is measured anew", stacklevel=4)
    return _measure(model, source, root, example, settings, layers, calls, block_shapes, report)


def _measure(
    model: nn.Module,
    source: nn.Module,
    root: Root,
    example: Example,
    settings: Settings,
    layers: Mapping[str, Layer],
    calls: Mapping[nn.Module, Calls],
    block_shapes: Mapping[str, tuple[int, int]],
    report: SpeedReport,
) -> tuple[nn.Module, SpeedReport]:
    device = _device(root)
    clock, n_bytes = clock_for(device), sum(p.numel() * p.element_size() for p in root.parameters())
    names = tuple(dict.fromkeys([*DENSE, *settings.kernels]))
    choice = Choice(names, settings.min_gain, settings.dtype == "bfloat16", clock, LAYER_TIMING, n_bytes)
    folded = copy.deepcopy(root)
    speeds: list[LayerSpeed] = []
    for name, layer in layers.items():
        if reason := left_alone(layer, calls.get(layer)):
            speeds.append(LayerSpeed(name, describe(layer), reason=reason))
            continue
        given = block_shapes.get(f"{name}.weight")
        shape = (given[0], given[1]) if given else find_block_shape(layer.weight)
        speed, module = choose(name, layer, calls[layer].inputs, shape, choice)
        replace_module(root, layer, module)
        speeds.append(speed)
    report = replace(report, layers=tuple(speeds))
    fast = fast_forms(root, example)
    dense = dense_forms(source, folded, example)
    if model is not source:
        dense["compiled"] = model, example
    limit = NETWORK_FACTOR * max(ERRORS.get(p.dtype, 0.0) for p in [*source.parameters(), torch.zeros(())])
    limit = max(limit, NETWORK_FACTOR * ERRORS[torch.bfloat16]) if settings.dtype == "bfloat16" else limit
    expected = expected_output(source, example)
    if not expected:
        raise SettingError("the model returns no tensors to check: wrap it in a module whose forward returns some")
    verdict = judge(dense, fast, bf16_form(folded, example), expected, clock, NETWORK_TIMING, limit)
    report = replace(
        report,
        times=verdict.times,
        errors=verdict.errors,
        best_dense=verdict.best_dense,
        chosen=verdict.chosen,
        speedup=verdict.speedup,
    )
    if verdict.chosen == "dense":
        best, over = verdict.best_dense, verdict.times["dense"] / verdict.times[verdict.best_dense]
        note = f"the best of its accelerated forms runs at {verdict.tried:.2f} times the speed of its best dense form"
        note += f" ({best}, {over:.2f} times the model as given)" if best != "dense" else ""
        if "fast" in verdict.refused:
            note = f"its accelerated form {verdict.refused['fast']}"
        return copy.deepcopy(source), replace(report, note=note)
    return fast[verdict.chosen][0].model, report


def _apply(
    source: nn.Module,
    root: Root,
    example: Example,
    layers: Mapping[str, Layer],
    calls: Mapping[nn.Module, Calls],
    stored: SpeedReport,
) -> tuple[nn.Module, SpeedReport]:
    """Return the model with the stored choices, each kernel checked against float64 once more."""
    stored = replace(stored, note="choices and times are those of the stored plan")
    if not stored.is_faster:
        return copy.deepcopy(source), stored
    choice = Choice((), stored.min_gain, stored.dtype == "bfloat16", clock_for(_device(root)), LAYER_TIMING, 0)
    for speed in stored.layers:
        if speed.reason or speed.winner == "dense":
            continue
        layer = layers[speed.name]
        one = replace(choice, kernels=(speed.winner,))
        built, _, refused = build_all(layer, calls[layer].inputs, speed.block_shape, one)
        if speed.winner in built:
            replace_module(root, layer, built[speed.winner])
        else:
            why = refused.get(speed.winner, "it does not apply")
            warnings.warn(f"{speed.name} stays dense, not {speed.winner}: {why}", stacklevel=5)
    return fast_forms(root, example)[stored.chosen][0].model, stored


def _layers(root: nn.Module) -> dict[str, Layer]:
    """Return every Linear, Conv1d and Conv2d under its name in the model as given."""
    found = {name: m for name, m in root.named_modules() if isinstance(m, LAYER_TYPES)}
    return {name.removeprefix("model").removeprefix(".").replace(PREFIX, ""): layer for name, layer in found.items()}


def _device(root: nn.Module) -> torch.device:
    tensors: list[Tensor | Any] = [*root.parameters(), *root.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
