"""compress: any module made so many times smaller without training, with or without calibration batches."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_muws.artifact.load import Progress
from lightning_muws.artifact.precision import largest
from lightning_muws.artifact.report import SaveReport
from lightning_muws.artifact.save import save_compressed
from lightning_muws.artifact.source import read_state
from lightning_muws.calibration.batches import Forward, feed, read_batches
from lightning_muws.calibration.layers import layer_grid
from lightning_muws.calibration.network import CalibratedNetwork, Fitted, Observed, Target, half
from lightning_muws.calibration.refit import Rate, nearest
from lightning_muws.errors import SettingError
from lightning_muws.structure.cost import SEARCH, check_compression, file_bytes, unreachable
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.layer import Bounds, Layer, measure
from lightning_muws.structure.micro import MicroStructure
from lightning_muws.structure.plan import LayerRule, PlanEntry, clean_name, make_plan
from lightning_muws.structure.structure import Structure
from lightning_muws.tables import Column, Table, Tabular

AIM = 1.02  # what is tried
TRIALS = 8  # of sizes, at the most
Kinds = tuple[int, int, int]


@dataclass(frozen=True)
class CompressedLayer:
    """One weight of a compressed model.

    Args:
        name: Name of the parameter.
        shape: Its shape.
        counts: Its blocks: dense, unified, pruned; zeros if it is not cut.
        step: Distance of neighbouring values, in units of the weight; 0 if they are exact.
        weight_error: ``|W - W'| / |W|``.
        error_nearest: ``|y - y'| / |y|`` of the layer's outputs on the calibration batches if its weight were rounded
            to the nearest; NaN without calibration, or if the layer is never called.
        error: The same for the refitted weight.
        n_bytes: About how many bytes of the file it takes.
    """

    name: str
    shape: tuple[int, ...]
    counts: Kinds
    step: float
    weight_error: float
    error_nearest: float
    error: float
    n_bytes: float


@dataclass(frozen=True)
class CompressReport(Tabular):
    """The result of :func:`compress`; ``print`` and notebooks show it as a table.

    Args:
        layers: One report for each weight of two or more axes.
        compression: What was requested.
        n_bytes: Bytes of the file that ``save_compressed(model)`` writes.
        dense_bytes: Bytes of all tensors in memory; shared memory counts once.
        n_trials: How many sizes were tried.
        weight_error: ``|W - W'| / |W|`` of all these weights together.
        steps: Distance of neighbouring values of each tensor of the file, by name; 0 if they are exact.
    """

    layers: tuple[CompressedLayer, ...]
    compression: float
    n_bytes: int
    dense_bytes: int
    n_trials: int
    weight_error: float
    steps: Mapping[str, float] = field(default_factory=dict)

    @property
    def compression_ratio(self) -> float:
        """Dense bytes over the bytes of the file; more is better."""
        return self.dense_bytes / self.n_bytes

    @property
    def error(self) -> float:
        """The mean relative error of the layers' outputs; NaN without calibration."""
        found = [layer.error for layer in self.layers if not math.isnan(layer.error)]
        return sum(found) / len(found) if found else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists, strings and numbers; numbers that are NaN as None."""
        layers = [{k: None if v != v else v for k, v in asdict(layer).items()} for layer in self.layers]
        return asdict(replace(self, layers=())) | {"layers": layers, "compression_ratio": self.compression_ratio}

    def tables(self) -> list[Table]:
        """Return the table of the layers."""
        columns = [
            Column("weight", room=24),
            Column("shape", drop=3),
            Column("dense", drop=1),
            Column("unified", drop=1),
            Column("pruned", drop=1),
            Column("step", drop=2),
            Column("weight error", drop=4),
            Column("nearest"),
            Column("refitted"),
            Column("bytes"),
        ]
        rows = [
            (
                layer.name,
                "x".join(map(str, layer.shape)),
                *(f"{n:,}" if any(layer.counts) else "" for n in layer.counts),
                f"{layer.step:.3g}",
                f"{layer.weight_error:.4f}",
                *("" if math.isnan(error) else f"{error:.4f}" for error in (layer.error_nearest, layer.error)),
                f"{layer.n_bytes:,.0f}",
            )
            for layer in self.layers
        ]
        mean = "" if math.isnan(self.error) else f"{self.error:.4f}"
        return [
            Table(
                title=f"{self.compression_ratio:.2f} times smaller: {self.n_bytes:,} of {self.dense_bytes:,} bytes",
                columns=columns,
                rows=rows,
                total=["all", "", "", "", "", "", "", "", mean, f"{self.n_bytes:,}"],
                notes=[
                    "dense, unified, pruned: blocks; step: values are multiples of it; weight error: |W - W'| / |W|; "
                    "nearest, refitted: |y - y'| / |y| of the layer's outputs on the calibration batches, if its "
                    "weight were rounded to the nearest, and as it is. Empty: no batch reached the layer."
                ],
            )
        ]


@torch.no_grad()
def compress(
    model: nn.Module,
    compression: float = 8.0,
    calibration: Any = None,
    *,
    structure: Structure = MicroStructure(),
    rules: Sequence[LayerRule] = (),
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> tuple[nn.Module, CompressReport]:
    """Return a copy of a model whose file is ``compression`` times smaller than its tensors, and a report.

    ``save_compressed(model)`` writes that file, lossless: each tensor's values are multiples of one step already. One
    price for a bit sets the steps and the kinds of all blocks. With calibration batches, the weights of linear and
    convolution layers are refitted layer after layer, so that each layer returns what it returned in the dense network
    (:mod:`lightning_muws.calibration`), and batch norms are re-estimated. Other weights are rounded to the nearest.

    Args:
        model: Any module; it stays as it is. A copy of it runs in evaluation mode.
        compression: How many times smaller the file is at least, above 1; it is at most 5 % smaller than needed,
            wherever such a file exists.
        calibration: An iterable of some batches of typical inputs. A tensor is given to the model as it is, a tuple or
            list as positional arguments (those beyond what ``forward`` accepts, such as labels, are left out), a
            mapping as named arguments. All batches are in memory at once, with the inputs of one layer.
        structure: For all weights that no rule matches. One with both ratios 0 leaves the kinds of blocks open.
        rules: Exceptions, the last matching one wins; see :class:`LayerRule`.
        forward: Runs the model on a batch, ``forward(model, batch)``, where the rule above does not fit.
        progress: Called with the weights done and all weights; begins again for each size that is tried.

    Returns:
        The model, on the same device and with the same training flags; and the report.

    Raises:
        SettingError: A setting is not allowed, the compression cannot be reached, or ``calibration`` has no batches.
        PlanError: The rules do not fit the model, or no weight is covered.
        StateError: The model fails on a batch, or a weight or a layer's input has NaN or Inf; it names the layer.

    Example:
        >>> from lightning_muws import compress
        >>> generator = torch.Generator().manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
        >>> small, report = compress(net, 8, [torch.randn(256, 64, generator=generator)])
        >>> 8 <= report.compression_ratio <= 8.4
        True
    """
    check_compression(compression)
    if not isinstance(model, nn.Module):
        raise SettingError(f"model is a {type(model).__name__}, a torch.nn.Module is needed")
    task = _Task(model, structure, rules, progress or (lambda done, total: None))
    if calibration is not None:
        device = next((x.device for x in task.originals.values()), torch.device("cpu"))
        task.calibrate(read_batches(calibration, device), forward or feed)
    best, trials = task.search(compression)
    return task.result(best), task.report(best, compression, trials)


@dataclass
class _Found:
    """One size that was tried."""

    state: dict[str, Tensor]
    saved: SaveReport
    fitted: Mapping[str, Fitted]
    steps: Mapping[str, float]


@dataclass
class _Task:
    """A dense network in evaluation mode, its compressed copy, and what is known of its tensors."""

    model: nn.Module
    structure: Structure
    rules: Sequence[LayerRule]
    progress: Progress
    network: CalibratedNetwork | None = None
    observed: Mapping[str, Observed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dense, self.compressed = copy.deepcopy(self.model).eval(), copy.deepcopy(self.model).eval()
        for p in self.dense.parameters():  # a frozen weight can be compressed as well
            if p.is_floating_point():
                p.requires_grad_(True)
        self.entries = make_plan(self.dense, self.structure, self.rules, open_ratios=True).covered
        self.buffers = {clean_name(name) for name, _ in self.dense.named_buffers()}
        self.originals, self.tensors = _stored(self.dense), _stored(self.compressed)
        self.layers = self._measure()

    def calibrate(self, batches: Sequence[Any], forward: Forward) -> None:
        """Look at the layers' inputs in the dense network."""
        self.network = CalibratedNetwork(self.dense, self.compressed, batches, forward)
        self.observed = self.network.observe()
        fed = {name for name in self.observed if self._is_fed(name)}
        self.observed = {name: found for name, found in self.observed.items() if name in fed}
        self.layers |= self._measure({name: found.stiffness / found.energy for name, found in self.observed.items()})

    def _is_fed(self, name: str) -> bool:
        """Return whether a layer's inputs tell how to refit its weight."""
        batched = name in self.entries and self.entries[name].grid.batched
        known = name in self.originals and self.layers[name].unit > 0
        return known and not batched and self.observed[name].energy > 0

    def _measure(self, importance: Mapping[str, float] | None = None) -> dict[str, Layer]:
        names = self.originals if importance is None else importance
        found = {}
        for name in names:
            entry, given = self.entries.get(name), (importance or {}).get(name)
            bounds = Bounds.of(entry) if entry else None
            layer = measure(name, self.originals[name], bounds, given, name in self.buffers)
            found[name] = replace(layer, recovery=1.0)
        return found

    def search(self, compression: float) -> tuple[_Found, int]:
        """Return the largest file found that is small enough, and how many were tried.

        Raises:
            SettingError: The compression cannot be reached.
        """
        dense_bytes = sum(layer.dense_bytes for layer in self.layers.values())
        limit = dense_bytes / compression

        def size(multiplier: float) -> float:
            return file_bytes(layer.share(multiplier).n_bytes for layer in self.layers.values())

        reachable = dense_bytes / size(SEARCH[0]), dense_bytes / size(SEARCH[1])
        if compression > reachable[1]:
            raise unreachable(compression, reachable)
        n_bytes: list[int] = []

        def trial(multiplier: float) -> tuple[int, _Found]:
            found = self._try(multiplier)
            n_bytes.append(found.saved.n_bytes)
            return n_bytes[-1], found

        best = largest(trial, size, limit, AIM, TRIALS)
        if best is None:
            raise unreachable(compression, (reachable[0], dense_bytes / min(n_bytes)))
        return best, len(n_bytes)

    def _try(self, multiplier: float) -> _Found:
        """Compress all tensors at one price for a bit, and return what comes out."""
        network = self.network
        fed = [] if network is None else list(self.observed)
        biases = {_bias_of(name) for name in fed if network is not None and network.refits_bias(name)}
        total, n_done, steps = sum(x.numel() for x in self.originals.values()), 0, {}

        def done(name: str) -> None:
            nonlocal n_done
            n_done += self.originals[name].numel()
            self.progress(n_done, total)

        for name, x in self.tensors.items():
            x.copy_(self.originals[name])
            steps[name] = _single(self.layers[name].share(multiplier).step)
        for name in self.tensors:  # what layers are refitted for comes first
            if name not in biases and name not in self.observed:
                self._round(name, steps[name], multiplier)
                done(name)
        fitted: dict[str, Fitted] = {}
        if network is not None:
            fitted = network.fit({name: self._target(network, name, steps, multiplier) for name in fed}, done)
        for name in biases:
            done(name)
        with tempfile.TemporaryDirectory() as folder:
            saved = save_compressed(self.compressed, Path(folder) / "model.muws")
        return _Found({name: x.clone() for name, x in self.tensors.items()}, saved, fitted, steps)

    def _round(self, name: str, step: float, multiplier: float) -> None:
        """Round a tensor to the nearest values, in blocks of the kinds that are cheapest."""
        x, entry = self.tensors[name], self.entries.get(name)
        if not x.is_floating_point() or x.element_size() == 1:
            return
        if name in self.buffers:
            x.copy_(half(x))
        elif step and entry is not None:
            x.copy_(nearest(x, step, entry.grid, self._kinds(entry, multiplier), _shares_signs(entry)))
        elif step:
            x.copy_(nearest(x, step, None, None, False))

    def _kinds(self, entry: PlanEntry, multiplier: float) -> Tensor:
        """Return the kinds of the blocks of a weight by distance alone, ``(down, across)`` uint8."""
        original = self.originals[entry.name]
        if not entry.is_open:
            return entry.structure.nearest(original, entry.grid, entry.name).support.kinds
        _, kinds = self.layers[entry.name].settle(multiplier)
        return kinds.to(torch.uint8).view(entry.grid.counts(entry.shape)).to(original.device)

    def _target(self, network: CalibratedNetwork, name: str, steps: Mapping[str, float], multiplier: float) -> Target:
        layer, entry, step = self.layers[name], self.entries.get(name), steps[name]
        bit, bias_step = multiplier * self.observed[name].energy, steps.get(_bias_of(name), 0.0)
        if entry is None:
            return Target(layer_grid(network.layers[name][0]), Rate(step, bit), False, bias_step)
        prices, _ = layer.settle(multiplier)
        dense, unified, _, pruned = prices.kinds
        rate = Rate(step, bit, (dense, unified, pruned), prices.magnitude.bits, _shares_signs(entry))
        choose = None
        if not entry.is_open:
            choose = lambda x: entry.structure.nearest(x, entry.grid, name).support.kinds  # noqa: E731
        return Target(entry.grid, rate, True, bias_step, self._kinds(entry, multiplier), choose)

    def result(self, found: _Found) -> nn.Module:
        """Return the compressed model with the training flags of the given one."""
        for name, x in self.tensors.items():
            x.copy_(found.state[name])
        for own, given in zip(self.compressed.modules(), self.model.modules(), strict=True):
            own.training = given.training
        return self.compressed

    def report(self, found: _Found, compression: float, n_trials: int) -> CompressReport:
        """Return the report on what was found."""
        n_bytes = {tensor.name: tensor.n_bytes for tensor in found.saved.tensors}
        layers, apart, size = [], 0.0, 0.0
        for name, x in self.originals.items():
            if x.ndim < 2 or not x.is_floating_point() or name in self.buffers:
                continue
            entry, own, errors = self.entries.get(name), found.state[name], found.fitted.get(name)
            squares = float(x.double().square().sum()), float((x.double() - own.double()).square().sum())
            size, apart = size + squares[0], apart + squares[1]
            layers.append(
                CompressedLayer(
                    name,
                    tuple(x.shape),
                    _counts(own, entry) if entry else (0, 0, 0),
                    found.steps[name],
                    _share(squares[1], squares[0]),
                    errors.error_nearest if errors else math.nan,
                    errors.error if errors else math.nan,
                    n_bytes[name],
                )
            )
        saved = found.saved
        return CompressReport(
            tuple(layers), compression, saved.n_bytes, saved.dense_bytes, n_trials, _share(apart, size), found.steps
        )


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a file of a model holds, in the model's own memory, by name; shared ones once."""
    found: dict[Hashable, tuple[str, Tensor]] = {}
    for name, x in read_state(model).tensors.items():
        found.setdefault(x.key, (name, x.read()))
    return dict(found.values())


def _share(apart: float, size: float) -> float:
    return math.sqrt(apart / size) if size else 0.0


def _shares_signs(entry: PlanEntry) -> bool:
    return isinstance(entry.structure, MicroStructure) and entry.structure.signs == "shared"


def _bias_of(name: str) -> str:
    """Return the name of the bias of the layer whose weight has this name."""
    return f"{name.removesuffix('weight')}bias"


def _single(step: float) -> float:
    """Return a step that float32 holds exactly: files have such steps."""
    return float(np.float32(step))


def _counts(weight: Tensor, entry: PlanEntry) -> Kinds:
    """Return how many blocks of a weight are dense, unified and pruned."""
    blocks = entry.grid.split(weight.detach()).abs()
    is_one = (blocks == blocks[:, :1]).all(1)
    kinds = torch.where(is_one, int(Kind.UNIFIED), int(Kind.DENSE)).masked_fill(
        is_one & (blocks[:, 0] == 0), int(Kind.PRUNED)
    )
    dense, unified, pruned = kinds.bincount(minlength=3).tolist()
    return dense, unified, pruned
