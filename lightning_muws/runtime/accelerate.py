"""Swaps layers for the fastest measured way to compute them, and keeps dense where dense wins."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muws.errors import SettingError
from lightning_muws.runtime.kernels import ALLOWED, DENSE, KERNELS, ON_REQUEST
from lightning_muws.runtime.kernels.base import LAYER_TYPES, Kernel, Layer
from lightning_muws.runtime.kernels.native_int8 import Int8Sparse
from lightning_muws.runtime.measure.activations import Inputs, check_batches, collect, fit
from lightning_muws.runtime.measure.layer import (
    ERRORS,
    ROUNDED_ERROR,
    Criteria,
    build_all,
    choose,
    describe,
    left_alone,
)
from lightning_muws.runtime.measure.network import Verdict, bf16_form, dense_forms, expected_output, fast_forms, judge
from lightning_muws.runtime.measure.report import LayerSpeed, Machine, SpeedReport
from lightning_muws.runtime.measure.stored import stale
from lightning_muws.runtime.native.library import level
from lightning_muws.runtime.rewrite.graph import fold
from lightning_muws.runtime.rewrite.observe import Calls, Example, Root, inference, observe, replace_module
from lightning_muws.runtime.shapes import infer_shape_for_kernels
from lightning_muws.runtime.timing import Timing, clock_for

LAYER_TIMING = Timing(rounds=9, least_rounds=3, budget_s=0.5)
CACHED_BYTES = 1 << 22  # a network of at most so many finds its weights in the caches: each layer runs warm
WARM = replace(LAYER_TIMING, sample_s=0.001)  # a layer alone runs cold once, and as in such a network from then on
NETWORK_TIMING = Timing(rounds=15, least_rounds=5, budget_s=4.0, sample_s=0.01)
NETWORK_FACTOR = 10.0  # a network's error may be this many times a layer's
PREFIX = "_orig_mod."  # in the names of what torch.compile wraps


@dataclass(frozen=True)
class Settings:
    """The settings of :func:`accelerate`, checked.

    Args:
        min_gain: How many times faster than dense a kernel must be.
        dtype: The lowest precision allowed; empty: the model's.
        max_error: The relative error that the output of a layer of lower precision may have.
        kernels: Names of the kernels to try.
        block_shapes: ``(rows, columns)`` of the blocks, by the name of the weight.
    """

    min_gain: float = 1.1
    dtype: str = ""
    max_error: float = ROUNDED_ERROR
    kernels: Sequence[str] = tuple(KERNELS)
    block_shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        gain: object = self.min_gain  # a caller may pass anything
        if isinstance(gain, bool) or not isinstance(gain, (int, float)) or not gain >= 1:
            raise SettingError(f"min_gain={self.min_gain!r} is not allowed: give a number of at least 1, such as 1.1")
        if self.dtype not in ("", "float32", *ALLOWED):
            raise SettingError(
                f"dtype={self.dtype!r} is not allowed: give None, torch.float32, torch.bfloat16 or torch.int8"
            )
        error: object = self.max_error
        if isinstance(error, bool) or not isinstance(error, (int, float)) or not 0 < error <= 1:
            raise SettingError(
                f"max_error={self.max_error!r} is not allowed: give a number above 0 and up to 1, such as 0.03"
            )
        if isinstance(self.kernels, str) or not isinstance(self.kernels, Sequence):
            raise SettingError(f"kernels={self.kernels!r} is not allowed: give a list of names, such as ['compact']")
        if unknown := [name for name in self.kernels if name not in KERNELS]:
            raise SettingError(f"kernels={unknown!r} are not in the table; it has {', '.join(KERNELS)}")
        if not isinstance(self.block_shapes, Mapping):
            kind = type(self.block_shapes).__name__
            raise SettingError(f"block_shapes is a {kind}: give a dict from weight names to (rows, columns)")
        for name, shape in self.block_shapes.items():
            if not _is_block_shape(shape):
                raise SettingError(
                    f"block_shapes[{name!r}]={shape!r} is not allowed: give (rows, columns), whole numbers from 1 on"
                )


def _is_block_shape(shape: object) -> bool:
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        return False
    return all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in shape)


@dataclass(frozen=True)
class Acceleration:
    """One call of :func:`accelerate`: the model, and the copy whose layers are swapped.

    Args:
        model: The model as given.
        source: The module inside torch.compile's wrapper; the model itself if it has none.
        root: A copy of ``source`` without torch.compile, its batch norms folded. Its layers are swapped in place.
        example: The example input.
        settings: The checked settings.
        layers: Each Linear, Conv1d and Conv2d of ``root``, by its name in ``source``.
        calls: How the example calls each module of ``root``.
        n_folded: Batch norms folded.
        batches: The calibration batches.
        gathered: What each layer gets from them.
    """

    model: nn.Module
    source: nn.Module
    root: Root
    example: Example
    settings: Settings
    layers: Mapping[str, Layer]
    calls: Mapping[nn.Module, Calls]
    n_folded: int
    batches: Sequence[Example] = ()
    gathered: Mapping[nn.Module, Inputs] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: nn.Module, example: Example, settings: Settings, batches: Sequence[Example] = ()
    ) -> Acceleration:
        """Copy the model without torch.compile, fold its batch norms, and run the example and the batches once."""
        source = _unwrapped(model)
        root = Root(copy.deepcopy(source))
        for child in list(root.modules()):
            if (inside := _unwrapped(child)) is not child:
                replace_module(root, child, inside)
        n_folded = fold(root, example)
        layers, calls = _layers(root), observe(root, example)
        gathered = collect(root, layers.values(), batches) if batches else {}
        return cls(model, source, root, example, settings, layers, calls, n_folded, batches, gathered)

    @property
    def device(self) -> torch.device:
        """The device of the model's first tensor."""
        tensors: list[Tensor | Any] = [*self.root.parameters(), *self.root.buffers()]
        return tensors[0].device if tensors else torch.device("cpu")

    @property
    def clock(self) -> Callable[[], float]:
        """The clock for this device."""
        return clock_for(self.device)

    @property
    def report(self) -> SpeedReport:
        """A report of the circumstances alone: nothing is measured."""
        return SpeedReport(
            machine=Machine.here(self.device),
            inputs=tuple(tuple(x.shape) for x in self.example.tensors),
            min_gain=self.settings.min_gain,
            dtype=self.settings.dtype,
            n_folded=self.n_folded,
            max_error=self.settings.max_error if self.settings.dtype in ALLOWED else 0.0,
        )

    def criteria_of(self, layer: Layer, criteria: Criteria) -> Criteria:
        """Return how the kernels of one layer are judged: its form in 8 bits is fitted to the calibration batches."""
        if "native_int8" not in criteria.kernels or self.settings.dtype != "int8":
            return criteria
        inputs = self.gathered.get(layer)
        fitted = fit(layer, self.calls[layer].inputs[0], inputs)
        return replace(criteria, fitted={"native_int8": fitted}, samples=inputs.kept if inputs else ())

    def criteria(self, kernels: Sequence[str]) -> Criteria:
        """Return how kernels of these names are judged."""
        n_bytes = sum(p.numel() * p.element_size() for p in self.root.parameters())
        return Criteria(
            kernels=kernels,
            min_gain=self.settings.min_gain,
            rounded=ALLOWED.get(self.settings.dtype, ()),
            max_error=self.settings.max_error,
            clock=self.clock,
            timing=WARM if n_bytes <= CACHED_BYTES else LAYER_TIMING,
            n_bytes=n_bytes,
        )


def accelerate(
    model: nn.Module,
    example_input: object,
    min_gain: float = 1.1,
    dtype: torch.dtype | None = None,
    kernels: Sequence[str] | None = None,
    plan: SpeedReport | str | Path | None = None,
    block_shapes: Mapping[str, tuple[int, int]] | None = None,
    calibration: object = None,
    max_error: float | None = None,
) -> tuple[nn.Module, SpeedReport]:
    """Return a copy of the model that is as fast as measurements on this machine can make it, and the report.

    Each Linear, Conv1d and Conv2d that the example reaches is built with every kernel that applies, checked against
    float64, and timed; the fastest stays. The whole network is then timed against its best dense form. If it is not
    faster, ``accelerate`` returns an unchanged copy of the model, and the report says so. It never changes the model
    that it is given.

    The copy is for inference. Its outputs are right for inputs of any shape; its speed is measured for the shape of the
    example, on this machine and with this number of threads. ``torch.export.save`` and AOTInductor can store it; a
    process that loads such a file runs ``import lightning_muws.ops`` first, which registers the operators.

    Args:
        model: In eval mode, on any device. What is compiled in it is unwrapped: compile the fast copy again.
        example_input: A tensor, a tuple of arguments, or a dict of keyword arguments, as the model is called in use.
        min_gain: How many times faster than the best dense form of its layer a kernel must be.
        dtype: ``torch.bfloat16`` lets kernels of that precision win, ``torch.int8`` also those with 8-bit weights and
            inputs; otherwise they are timed for comparison only, and the outputs are those of float32.
        kernels: Names of the kernels to try (``lightning_muws.runtime.kernels.KERNELS``); all by default.
        plan: A report, or the path of a saved one, whose choices are reused without timing. It is stale on another
            machine or torch, with another number of threads or input shape, or if other weights are pruned: a warning
            gives the reason, and everything is measured again.
        block_shapes: Block shapes by the name of the weight (``features.0.weight``), as a plan or a file gives them;
            by default each is inferred from the weight.
        calibration: Batches for ``dtype=torch.int8``, each given as ``example_input`` is: some hundred samples of the
            data that the network will see. They set the ranges of 8-bit inputs and measure the errors. Without them
            only a Linear can be in 8 bits, each sample by its own range.
        max_error: The relative error that a layer's output may have in a lower precision, 0.03 by default. A layer
            that loses more stays in a higher precision; the report says which and why. The network's output may have
            ten times that.

    Returns:
        The accelerated copy, and the report.

    Raises:
        SettingError: A setting is not allowed, the model is in training mode, ``block_shapes`` names a weight that
            the model does not have, 8 bits are not possible here, or a calibration batch has another shape than the
            example, or NaN.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 8)).eval()
        >>> _ = model[0].weight.data[:448].zero_()
        >>> fast, report = accelerate(model, torch.randn(32, 512))
        >>> torch.testing.assert_close(fast(torch.ones(3, 512)), model(torch.ones(3, 512)))
    """
    name = "" if dtype is None else str(dtype).removeprefix("torch.")
    settings = Settings(
        min_gain,
        name,
        ROUNDED_ERROR if max_error is None else max_error,
        tuple(k for k in KERNELS if name == "int8" or k not in ON_REQUEST) if kernels is None else kernels,
        {} if block_shapes is None else block_shapes,
    )
    _check_model(model, settings)
    _check_rounding(settings, calibration, max_error)
    stored, example = _load_plan(plan), Example.of(example_input)
    batches = [] if calibration is None else check_batches(calibration, example)
    with inference():
        work = Acceleration.of(model, example, settings, batches)
        if settings.dtype == "int8" and work.device.type != "cpu":
            raise SettingError(f"dtype=torch.int8 is not allowed on {work.device}: move the model to the CPU")
        if stored is not None:
            reason = stale(stored, work.report, work.layers, work.calls)
            if not reason:
                return _apply(work, stored)
            warnings.warn(f"ignoring the saved plan ({reason}); measuring again", stacklevel=2)
        return _measure(work)


def _unwrapped(model: nn.Module) -> nn.Module:
    source: nn.Module = getattr(model, "_orig_mod", model)
    return source


def _check_model(model: object, settings: Settings) -> None:
    if not isinstance(model, nn.Module):
        raise SettingError(f"model is a {type(model).__name__}: give a torch.nn.Module")
    source = _unwrapped(model)
    if source.training:
        raise SettingError(
            "the model is in training mode, where batch norm and dropout depend on the batch: call model.eval() first"
        )
    names = {_plain(name) for name, _ in source.named_parameters(remove_duplicate=False)}
    if unknown := [name for name in settings.block_shapes if _plain(str(name)) not in names]:
        raise SettingError(
            f"block_shapes names {unknown[:3]!r}, which the model does not have: give its weights' names"
        )


def _check_rounding(settings: Settings, calibration: object, max_error: float | None) -> None:
    if settings.dtype == "int8" and level() is None:
        raise SettingError(
            "dtype=torch.int8 is not allowed here: it needs the native kernels, which are not installed or switched off"
        )
    if calibration is not None and settings.dtype != "int8":
        raise SettingError("calibration is given, but nothing is rounded to 8 bits: add dtype=torch.int8")
    if max_error is not None and settings.dtype not in ALLOWED:
        raise SettingError(
            "max_error is given, but no lower precision is allowed: add dtype=torch.int8 or torch.bfloat16"
        )


def _load_plan(plan: object) -> SpeedReport | None:
    stored = SpeedReport.load(plan) if isinstance(plan, (str, Path)) else plan
    if stored is None or isinstance(stored, SpeedReport):
        return stored
    raise SettingError(f"plan is a {type(plan).__name__}, no speed report: give a report or the path of a saved one")


def _measure(work: Acceleration) -> tuple[nn.Module, SpeedReport]:
    """Return the model with the layers that win, if it wins as a whole, and the report."""
    folded = copy.deepcopy(work.root)
    speeds, native = _choose_layers(work)
    report = replace(work.report, layers=tuple(speeds))
    dense = dense_forms(work.source, folded, work.example)
    if work.model is not work.source:
        dense["compiled"] = work.model, work.example
    names = {module: name for name, module in work.root.named_modules()}
    fast = fast_forms(work.root, work.example, {names[module]: kernel for module, (_, kernel) in native.items()})
    expected = expected_output(work.source, work.example)
    if not expected:
        raise SettingError("the model returns no tensors to check: wrap it in a module whose forward returns some")
    others = bf16_form(folded, work.example)
    check = (work.batches[0], expected_output(work.source, work.batches[0])) if work.batches else None
    verdict = judge(dense, fast, others, expected, work.clock, NETWORK_TIMING, _largest_error(work), check)
    report = replace(
        report,
        times=verdict.times,
        errors=verdict.errors,
        best_dense=verdict.best_dense,
        chosen=verdict.chosen,
        speedup=verdict.speedup,
    )
    if verdict.chosen == "dense":
        return copy.deepcopy(work.source), replace(report, note=_why_dense(verdict))
    if verdict.chosen == "fast_native":
        steps = {_name(names[module]): step for module, step in native.items()}
        report = replace(
            report, layers=tuple(_won_by(s, *steps[s.name]) if s.name in steps else s for s in report.layers)
        )
    return fast[verdict.chosen][0].model, report


def _choose_layers(work: Acceleration) -> tuple[list[LayerSpeed], dict[nn.Module, tuple[str, Kernel]]]:
    """Swap each layer for its fastest kernel, and return what was measured.

    The second is the fastest kernel for a chain, and its name, of each module whose kernel is not that one.
    """
    criteria = work.criteria(tuple(dict.fromkeys([*DENSE, *work.settings.kernels])))
    given = {_plain(name): shape for name, shape in work.settings.block_shapes.items()}
    speeds: list[LayerSpeed] = []
    native: dict[nn.Module, tuple[str, Kernel]] = {}
    for name, layer in work.layers.items():
        if reason := left_alone(layer, work.calls.get(layer)):
            speeds.append(LayerSpeed(name, describe(layer), reason=reason))
            continue
        rows, columns = given.get(f"{name}.weight" if name else "weight") or infer_shape_for_kernels(layer.weight)
        judged = work.criteria_of(layer, criteria)
        speed, module, step = choose(name, layer, work.calls[layer].inputs, (rows, columns), judged)
        replace_module(work.root, layer, module)
        speeds.append(_won_by(speed, speed.winner, module))
        if step is not None and step[1] is not module:
            native[module] = step
    return speeds, native


def _won_by(speed: LayerSpeed, winner: str, module: nn.Module) -> LayerSpeed:
    return replace(speed, winner=winner, rounding=module.way if isinstance(module, Int8Sparse) else "")


def _largest_error(work: Acceleration) -> float:
    """Return the relative error that the whole network may have."""
    dtypes = {p.dtype for p in work.source.parameters()} | {torch.float32}
    rounded = work.settings.max_error if work.settings.dtype in ALLOWED else 0.0
    return NETWORK_FACTOR * max(rounded, *(ERRORS.get(dtype, 0.0) for dtype in dtypes))


def _why_dense(verdict: Verdict) -> str:
    if "fast" in verdict.refused:
        return f"its accelerated form {verdict.refused['fast']}"
    note = f"the best of its accelerated forms runs at {verdict.tried:.2f} times the speed of its best dense form"
    if verdict.best_dense == "dense":
        return note
    over = verdict.times["dense"] / verdict.times[verdict.best_dense]
    return f"{note} ({verdict.best_dense}, {over:.2f} times the model as given)"


def _apply(work: Acceleration, stored: SpeedReport) -> tuple[nn.Module, SpeedReport]:
    """Return the model with the stored choices, and the stored report; each kernel is checked against float64 again."""
    stored = replace(stored, note="choices and times are those of the stored plan")
    if not stored.is_faster:
        return copy.deepcopy(work.source), stored
    for speed in stored.layers:
        if speed.reason or speed.winner == "dense":
            continue
        layer = work.layers[speed.name]
        criteria = work.criteria_of(layer, work.criteria((speed.winner,)))
        built, _, refused = build_all(layer, work.calls[layer].inputs, speed.block_shape, criteria)
        if speed.winner in built:
            replace_module(work.root, layer, built[speed.winner])
        else:
            why = refused.get(speed.winner, "it does not apply")
            warnings.warn(f"{speed.name} stays dense, not {speed.winner}: {why}", stacklevel=3)
    chosen = "fast_chained" if stored.chosen == "fast_native" else stored.chosen  # the layers are those of the chain
    forms = fast_forms(work.root, work.example)
    if chosen not in forms:
        warnings.warn(
            f"the form {chosen} of the stored plan cannot be made here: its layers run one by one", stacklevel=3
        )
    return forms.get(chosen, forms["fast"])[0].model, stored


def _layers(root: nn.Module) -> dict[str, Layer]:
    """Return every Linear, Conv1d and Conv2d under its name in the model as given."""
    found = {name: m for name, m in root.named_modules() if isinstance(m, LAYER_TYPES)}
    return {_name(name): layer for name, layer in found.items()}


def _name(name: str) -> str:
    """Return the name in the model as given of a module of its :class:`Root`."""
    return name.removeprefix("model").removeprefix(".")


def _plain(name: str) -> str:
    """Return the name that a module or a parameter has without torch.compile."""
    return name.replace(PREFIX, "")
