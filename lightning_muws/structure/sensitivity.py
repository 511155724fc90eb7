"""How much the loss grows when one layer alone is compressed: measured layer by layer, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_muws.errors import SettingError, StateError
from lightning_muws.generators import kept_generators
from lightning_muws.structure.cost import search
from lightning_muws.structure.layer import Bounds, Layer, Share, measure
from lightning_muws.structure.micro import MicroStructure
from lightning_muws.structure.plan import LayerRule, PlanEntry, make_plan
from lightning_muws.structure.stored import as_stored
from lightning_muws.tables import Column, Table, Tabular

Batch = TypeVar("Batch")
Progress = Callable[[int, int], None]  # measurements done, and of all
RATIOS = (2.0, 5.0, 10.0, 20.0, 50.0)
LEAST = 0.01  # of the most sensitive layer: where no harm was measured, a layer still costs this


@dataclass(frozen=True)
class Point:
    """The loss with one layer compressed.

    Args:
        ratio: The layer's dense bytes over its estimated bytes in a file.
        distance: The squared distance of the compressed weight from the dense one.
        loss: The mean loss; infinite where it is not finite.
    """

    ratio: float
    distance: float
    loss: float


@dataclass(frozen=True)
class LayerSensitivity:
    """How sensitive the loss is to one weight.

    Args:
        name: Name of the parameter.
        shape: Shape of the parameter.
        energy: The sum of its squares.
        points: One for each ratio that was asked for; None where the layer cannot be so small.
    """

    name: str
    shape: tuple[int, ...]
    energy: float
    points: tuple[Point | None, ...]

    def slope(self, dense_loss: float) -> float:
        """Return what a squared distance of 1 adds to the loss: at least 0.

        ``argmin_k sum |loss - dense_loss - k * distance|`` over the points with a finite loss: the median of the
        slopes, weighted with the distances (Bloomfield and Steiger 1983). The loss grows faster than the squared
        distance, so that the slopes of small distances are mostly noise.
        """
        points = [p for p in self.points if p and p.distance and math.isfinite(p.loss)]
        slopes = sorted(((p.loss - dense_loss) / p.distance, p.distance) for p in points)
        left = sum(distance for _, distance in slopes) / 2
        for slope, distance in slopes:
            left -= distance
            if left <= 0:
                return max(0.0, slope)
        return 0.0


@dataclass(frozen=True)
class SensitivityReport(Tabular):
    """The loss with one layer compressed, for each layer and ratio; ``print`` and notebooks show it as a table.

    Args:
        ratios: The ratios that were asked for: a layer's dense bytes over its estimated bytes.
        dense_loss: The mean loss of the model as it is.
        layers: One for each weight that can be cut into blocks, in the model's order.
    """

    ratios: tuple[float, ...]
    dense_loss: float
    layers: tuple[LayerSensitivity, ...]

    def importance(self) -> dict[str, float]:
        """Return what a squared distance of 1 costs in each layer, by name: for a budget's ``importance``.

        The loss is taken as linear in the squared distance, with :meth:`LayerSensitivity.slope`. The unit is chosen so
        that losing all of the median layer's energy costs 1, as it does by default for tensors that are not in here.
        Where no harm was measured, a layer costs a hundredth of the most sensitive one.
        """
        losses = {layer.name: layer.slope(self.dense_loss) * layer.energy for layer in self.layers if layer.energy}
        most = max(losses.values(), default=0.0) or 1.0
        shares = {name: max(loss / most, LEAST) for name, loss in losses.items()}
        middle = median(shares.values()) if shares else 1.0
        return {layer.name: shares[layer.name] / middle / layer.energy for layer in self.layers if layer.energy}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists, strings and numbers, ready for JSON; None for an infinite loss."""
        found = asdict(self)
        for layer in found["layers"]:
            for point in layer["points"]:
                if point and not math.isfinite(point["loss"]):
                    point["loss"] = None
        return found | {"importance": self.importance()}

    def tables(self) -> list[Table]:
        """Return the table of the layers: by how much the loss grows at each ratio."""
        columns = [Column("layer", room=24), Column("shape", drop=1), *(Column(f"{ratio:g}x") for ratio in self.ratios)]
        rows = [
            [layer.name, "x".join(map(str, layer.shape)), *(self._cell(point) for point in layer.points)]
            for layer in self.layers
        ]
        note = (
            "10x: this layer alone takes 10 times fewer bytes in a file, by estimate; -: it cannot be so small. "
            "Nothing is retrained: training repairs most of the growth."
        )
        return [
            Table(f"Growth of the loss, which is {self.dense_loss:.4g} without compression", columns, rows, (), [note])
        ]

    def _cell(self, point: Point | None) -> str:
        return f"{point.loss - self.dense_loss:+.2g}" if point else "-"


def sensitivity(
    model: nn.Module,
    loss: Callable[[nn.Module, Batch], Tensor],
    batches: Iterable[Batch],
    ratios: Sequence[float] = RATIOS,
    structure: MicroStructure = MicroStructure(),
    rules: Sequence[LayerRule] = (),
    progress: Progress | None = None,
) -> SensitivityReport:
    """Return the mean loss over batches with each layer alone compressed, beside that of the model as it is.

    A layer is compressed as a budget would compress it without training: each block takes its cheapest kind, and the
    values are rounded to the step that suits. The model is evaluated in ``eval`` mode, without gradients, and with the
    same random numbers each time. In the end it is as before, to the bit, also after an exception: weights, buffers,
    modes, gradients and global random number generators. One layer is copied at a time.

    Args:
        model: The network.
        loss: Returns the loss of the model on a batch, a tensor of one element.
        batches: They are kept in memory and used ``1 + n_layers * n_ratios`` times.
        ratios: How many times smaller a layer gets, each above 1.
        structure: How weights are cut into blocks, without ratios.
        rules: Other ways to cut some layers, or layers to leave out; the last rule that matches wins.
        progress: Called with the measurements done, and all.

    Raises:
        SettingError: A ratio is not above 1, there are no batches, or the loss is no tensor of one element.
        StateError: The loss of the model as it is is not finite on a batch, or a weight has NaN or Inf.
        PlanError: A rule matches nothing, or no weight is covered.

    Example:
        >>> layer = nn.Linear(32, 32)
        >>> batch = torch.randn(8, 32)
        >>> target = layer(batch).detach()
        >>> report = sensitivity(layer, lambda model, x: (model(x) - target).square().mean(), [batch], ratios=[2, 8])
        >>> report.dense_loss, report.layers[0].points[0].loss < report.layers[0].points[1].loss
        (0.0, True)
    """
    _check_ratios(ratios)
    with kept_generators():
        held = list(batches)
    if not held:
        raise SettingError("batches is empty: give at least one batch of what loss(model, batch) takes")
    entries = make_plan(model, structure, rules, open_ratios=True)
    covered, weights = entries.covered, entries.weights(model)
    n_done, n_all = 0, 1 + len(weights) * len(ratios)

    def mean_loss(is_dense: bool = False) -> float:
        nonlocal n_done
        with kept_generators():
            found = [_loss(loss, model, batch, i) for i, batch in enumerate(held)]
        bad = [i for i, value in enumerate(found) if not math.isfinite(value)]
        if bad and is_dense:
            raise StateError(
                f"the loss is {found[bad[0]]} on batch {bad[0]} of {len(held)} (counted from 0) before anything is "
                "compressed: find out why, or leave this batch out"
            )
        n_done += 1
        if progress:
            progress(n_done, n_all)
        return math.inf if bad else math.fsum(found) / len(found)

    layers = []
    with _evaluating(model):
        dense_loss = mean_loss(is_dense=True)
        for name, weight in weights.items():
            known = measure(name, weight.detach(), Bounds.of(covered[name]))
            energy = float(weight.detach().to(torch.float64).square().sum())
            points = tuple(_point(weight, covered[name], _share(known, ratio), mean_loss) for ratio in ratios)
            layers.append(LayerSensitivity(name, tuple(weight.shape), energy, points))
            n_done = 1 + len(layers) * len(ratios)  # some ratios cannot be reached
            if progress:
                progress(n_done, n_all)
    return SensitivityReport(tuple(float(ratio) for ratio in ratios), dense_loss, tuple(layers))


def _check_ratios(ratios: object) -> None:
    given = list(ratios) if isinstance(ratios, (list, tuple)) else []
    numbers = [x for x in given if isinstance(x, (int, float)) and not isinstance(x, bool) and 1 < x < math.inf]
    if not given or len(numbers) < len(given):
        raise SettingError(f"ratios={ratios!r} is not allowed: give finite numbers above 1, such as [2, 5, 10]")


def _loss(loss: Callable[[nn.Module, Batch], Tensor], model: nn.Module, batch: Batch, index: int) -> float:
    value: object = loss(model, batch)
    if not isinstance(value, Tensor):
        raise SettingError(
            f"loss returned a {type(value).__name__} on batch {index}: return a tensor of one element, the mean loss"
        )
    if value.numel() != 1:
        raise SettingError(
            f"loss returned a tensor of shape {tuple(value.shape)} on batch {index}: return one, its mean"
        )
    return float(value)


def _share(layer: Layer, ratio: float) -> Share | None:
    """Return what a layer gets if it alone shall be so many times smaller; None if it cannot."""
    target = layer.dense_bytes / ratio
    share = layer.share(search(lambda multiplier: layer.share(multiplier).n_bytes, target))
    return share if share.n_bytes <= target else None


def _point(weight: nn.Parameter, entry: PlanEntry, share: Share | None, mean_loss: Callable[[], float]) -> Point | None:
    """Return the loss with one weight compressed; the weight is as before in the end."""
    if share is None:
        return None
    raw = weight.detach().clone()
    stored = as_stored(raw, share.step, share.structure, entry.grid, name=entry.name)
    distance = float((stored.to(torch.float64) - raw.to(torch.float64)).square().sum())
    try:
        weight.copy_(stored)
        found = mean_loss()
    finally:
        weight.copy_(raw)
    return Point(raw.numel() * raw.element_size() / share.n_bytes, distance, found)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradients, and put back modes and buffers in the end."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(x, x.clone()) for x in model.buffers()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for x, value in buffers:
                x.copy_(value)
