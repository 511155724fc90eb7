"""Figures of weights, residuals and sensitivities; matplotlib (extra ``plots``) is imported when a figure is drawn.

A notebook shows what these functions return. In a script, write it to a file:
``plot_residuals(report).figure.savefig("residuals.png")``.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_muws.errors import MuwsError, SettingError
from lightning_muws.report import CompressionReport
from lightning_muws.structure.block_map import COLOURS, BlockMap
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.sensitivity import SensitivityReport
from lightning_muws.tables import visible
from lightning_muws.training.run import Update

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

N_NAMED = 10  # layers in a legend
PAIR = (12, 4)  # inches of a figure of two matrices
LAYER = (11, 7.5)  # inches of a figure of a layer
KIND_NAMES = {Kind.DENSE: "free", Kind.UNIFIED: "unified", Kind.PRUNED: "pruned"}


def plot_weight(matrix: Tensor, limit: float, ax: Axes | None = None, block_shape: tuple[int, int] = (1, 1)) -> Axes:
    """Draw a weight matrix and return its axes: red is positive, blue is negative, white is zero.

    Args:
        matrix: ``(out, in * kernel)``, as a grid's ``matrix`` returns it.
        limit: The magnitude that has the full colours.
        ax: Where to draw; a new figure with a colour bar if not given.
        block_shape: ``(outputs, inputs)`` of a block; thin lines separate the blocks. ``(1, 1)`` draws none.

    Raises:
        MuwsError: matplotlib is not installed.
    """
    is_new = ax is None
    ax = ax if ax is not None else _new_axes()
    ax.imshow(matrix.detach().float().cpu().numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    (rows, cols), (n_out, n_in) = block_shape, matrix.shape
    if (rows, cols) != (1, 1):
        ax.hlines(np.arange(rows, n_out, rows) - 0.5, -0.5, n_in - 0.5, color="0.8", linewidth=0.3)
        ax.vlines(np.arange(cols, n_in, cols) - 0.5, -0.5, n_out - 0.5, color="0.8", linewidth=0.3)
    ax.set(xlabel="input x kernel", ylabel="output")
    if is_new:
        _add_colour_bar(ax.figure, [ax])
    return ax


def plot_before_after(before: Tensor, after: Tensor, block_shape: tuple[int, int], title: str = "") -> Figure:
    """Draw a weight matrix before and after compression, on one scale, and return the figure.

    Args:
        before: ``(out, in * kernel)``, the dense weight.
        after: The same weight in its structure, of the same shape.
        block_shape: ``(outputs, inputs)`` of a block.
        title: Title of the figure.

    Raises:
        MuwsError: matplotlib is not installed.
    """
    figure = _new_figure(figsize=PAIR)
    limit = float(before.detach().abs().float().quantile(0.995)) or 1.0
    axes = list(figure.subplots(1, 2))
    for ax, matrix, name in zip(axes, (before, after), ("dense", "compressed"), strict=True):
        zeros = 1 - int(torch.count_nonzero(matrix)) / matrix.numel()
        plot_weight(matrix, limit, ax, block_shape).set_title(f"{name}: {zeros:.0%} zeros")
    _add_colour_bar(figure, axes)
    figure.suptitle(title)
    return figure


def plot_residuals(report: CompressionReport | Sequence[Update], ax: Axes | None = None) -> Axes:
    """Draw the primal and dual residuals of the ADMM updates and of the projection, and return the axes.

    Args:
        report: A report, or the history of a run.
        ax: Where to draw; a new figure if not given.

    Raises:
        MuwsError: matplotlib is not installed.
        SettingError: The history is empty.
    """
    history = report.history if isinstance(report, CompressionReport) else tuple(report)
    if not history:
        raise SettingError("the history has no update yet: draw it after ADMM's first update or after fit")
    ax = ax if ax is not None else _new_axes()
    # a projection has no dual residual
    updates, projected = (history[:-1], history[-1:]) if history[-1].dual == 0 else (history, ())
    ax.plot([u.when for u in history], [u.primal for u in history], "o-", markersize=4, label="primal |W - Z| / |W|")
    ax.plot([u.when for u in updates], [u.dual for u in updates], "s--", markersize=4, label="dual |Z - Z_old| / |W|")
    first, last = history[0].when, history[-1].when
    room = 0.2 * (last - first) or 0.5
    phases = [("method", first, last, "C0")] if updates else []
    for update in projected:
        label = "projection |W - project(W)| / |W|"
        ax.scatter([update.when], [update.primal], marker="*", s=120, color="C3", zorder=3, label=label)
        phases.append(("retraining", last, last + room, "C2"))
    for name, start, end, colour in phases:
        ax.axvspan(start, end, color=colour, alpha=0.08)
        top = ax.get_xaxis_transform()
        ax.annotate(name, (start, 1), (4, -4), xycoords=top, textcoords="offset points", va="top")
    ax.set(title="Residuals", xlabel="epoch or step of the update", ylabel="relative residual")
    ax.set(xlim=(first - room / 3, last + room), ylim=(0, 1.15 * max(max(u.primal, u.dual) for u in history) or 1))
    ax.legend()
    return ax


def plot_layer(
    name: str,
    weight: Tensor,
    grid: BlockGrid,
    kinds: Tensor,
    history: Sequence[Update] = (),
    caption: str = "",
) -> Figure:
    """Draw where the blocks of a weight lie, its magnitudes and the residuals of its run, and return the figure.

    Args:
        name: Name of the parameter.
        weight: The weight, of any shape that the grid cuts.
        grid: How it is cut into blocks.
        kinds: ``(down, across)``, a :class:`~lightning_muws.structure.kinds.Kind` a block.
        history: The updates of the run so far; without any, there is no picture of residuals.
        caption: What to add to the title, such as ``admm, epoch 3``.

    Raises:
        MuwsError: matplotlib is not installed.
    """
    figure = _new_figure(figsize=LAYER, layout=None)  # a computed layout takes twice the time
    (where, size), (shares, run) = figure.subplots(2, 2)
    figure.subplots_adjust(left=0.07, right=0.97, bottom=0.08, top=0.89, wspace=0.22, hspace=0.5)
    weight = weight.detach().float().cpu()
    found = BlockMap.of(kinds)
    down, across = found.n_blocks
    where.imshow(found.pixels(), interpolation="nearest", aspect="auto", extent=(0, across, down, 0))
    where.set(
        title=f"kind of each block of {grid.block_shape[0]}x{grid.block_shape[1]}", xlabel="block", ylabel="block"
    )
    where.legend(handles=_kind_patches(found.totals), loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    means = grid.split(weight).abs().mean(dim=1).view(found.n_blocks).numpy()
    cells = np.add.reduceat(
        np.add.reduceat(means, range(0, down, found.cell[0]), 0), range(0, across, found.cell[1]), 1
    )
    cells = cells / found.counts.sum(axis=2)
    image = size.imshow(cells, cmap="viridis", interpolation="nearest", aspect="auto", extent=(0, across, down, 0))
    size.set(title="mean magnitude of each block", xlabel="block", ylabel="block")
    figure.colorbar(image, ax=size, label="mean |weight|")
    _draw_magnitudes(shares, grid, weight, kinds.cpu())
    if history:
        plot_residuals(history, run)
    else:
        run.set_axis_off()
    figure.suptitle(f"{visible(name)}: {caption}" if caption else visible(name))
    return figure


def layer_picture(*args: Any) -> NDArray[np.uint8]:
    """Return the pixels ``(height, width, 3)`` of :func:`plot_layer`, for a logger."""
    figure = plot_layer(*args)  # refuses a missing matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[:, :, :3]


def _draw_magnitudes(ax: Axes, grid: BlockGrid, weight: Tensor, kinds: Tensor) -> None:
    """Draw a histogram of the magnitudes of a weight, one above the other for each kind of block."""
    blocks = grid.split(weight).abs()
    edges = torch.cat([edge.reshape(-1) for edge in grid.edges(grid.matrix(weight))]).abs()
    parts = [blocks[kinds.reshape(-1) == kind].reshape(-1) for kind in Kind]
    parts[Kind.DENSE] = torch.cat([parts[Kind.DENSE], edges])
    ax.hist(
        [part.numpy() for part in parts],
        bins=60,
        stacked=True,
        color=[_colour(kind) for kind in Kind],
        label=[KIND_NAMES[kind] for kind in Kind],
        edgecolor="0.6",
        linewidth=0.3,
    )
    zeros = 1 - int(torch.count_nonzero(weight)) / max(1, weight.numel())
    ax.set(title=f"magnitudes, {zeros:.0%} are zero", xlabel="|weight|", ylabel="weights", yscale="log")
    ax.legend()


def _kind_patches(totals: tuple[int, int, int]) -> list[Any]:
    from matplotlib.patches import Patch

    return [
        Patch(facecolor=_colour(kind), edgecolor="0.6", label=f"{KIND_NAMES[kind]}: {totals[kind]:,}") for kind in Kind
    ]


def _colour(kind: Kind) -> str:
    return "#" + bytes(COLOURS[kind]).hex()


def plot_sensitivity(report: SensitivityReport, ax: Axes | None = None) -> Axes:
    """Draw the loss over the ratio of each layer that is compressed alone, and return the axes.

    The legend has the most sensitive layers; all others are grey.

    Args:
        report: What :func:`lightning_muws.sensitivity` returns.
        ax: Where to draw; a new figure if not given.

    Raises:
        MuwsError: matplotlib is not installed.
    """
    ax = ax if ax is not None else _new_axes()
    most = sorted(report.layers, key=lambda layer: layer.energy * layer.slope(report.dense_loss), reverse=True)
    named = {layer.name for layer in most[:N_NAMED]}
    for layer in report.layers:
        points = [point for point in layer.points if point]
        style = {"label": layer.name} if layer.name in named else {"color": "0.8", "zorder": 1}
        ax.plot([point.ratio for point in points], [point.loss for point in points], "o-", markersize=4, **style)
    ax.axhline(report.dense_loss, color="0.3", linestyle=":", label="without compression")
    ax.set(title="Sensitivity", xlabel="how many times smaller this layer alone is", ylabel="loss", xscale="log")
    ax.set_xticks(report.ratios, [f"{ratio:g}" for ratio in report.ratios])
    ax.minorticks_off()
    ax.legend(fontsize="small")
    return ax


def _add_colour_bar(figure: Any, axes: list[Axes]) -> None:
    figure.colorbar(axes[-1].images[0], ax=axes, extend="both", shrink=0.7, label="weight (white: zero)")


def _new_figure(layout: Literal["constrained"] | None = "constrained", **options: Any) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MuwsError("figures need matplotlib: pip install 'lightning-muws[plots]'") from None
    figure = Figure(layout=layout, **options)
    _show_in_notebooks(figure, figure)
    return figure


def _new_axes() -> Axes:
    figure = _new_figure()
    ax = figure.subplots()
    _show_in_notebooks(ax, figure)
    return ax


def _show_in_notebooks(artist: Any, figure: Figure) -> None:
    """Let a notebook show the picture: by itself it shows only figures that pyplot manages, and no axes."""
    artist._repr_png_ = partial(_png, figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
