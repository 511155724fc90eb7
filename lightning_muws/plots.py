"""Figures drawn from the dataclasses of report; matplotlib (extra ``plots``) is imported inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_muws.errors import MuwsError
from lightning_muws.report import CompressionReport
from lightning_muws.training.run import Update

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor


def plot_weight(matrix: Tensor, limit: float, ax: Axes | None = None, block_shape: tuple[int, int] = (1, 1)) -> Axes:
    """Draw a weight matrix: red positive, blue negative, white zero; thin lines between blocks.

    Args:
        matrix: ``(out, in * kernel)``, as a grid's ``matrix`` returns it.
        limit: The magnitude of the full colours.
        ax: Where to draw; a new figure if not given.
        block_shape: Distances of the lines; ``(1, 1)`` draws none.

    Returns:
        The axes that were drawn on.
    """
    ax = ax if ax is not None else _new_axes()
    ax.imshow(matrix.detach().float().cpu().numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    (rows, cols), (n_out, n_in) = block_shape, matrix.shape
    if (rows, cols) != (1, 1):
        ax.hlines(np.arange(rows, n_out, rows) - 0.5, -0.5, n_in - 0.5, color="0.8", linewidth=0.3)
        ax.vlines(np.arange(cols, n_in, cols) - 0.5, -0.5, n_out - 0.5, color="0.8", linewidth=0.3)
    ax.set(xlabel="input x kernel", ylabel="output")
    return ax


def plot_before_after(before: Tensor, after: Tensor, block_shape: tuple[int, int], title: str = "") -> Figure:
    """Draw a weight matrix before and after compression, on one scale.

    Args:
        before: ``(out, in * kernel)``, the dense weight.
        after: The same weight in its structure.
        block_shape: ``(outputs, inputs)`` of a block.
        title: Of the figure.

    Returns:
        The figure, to be saved or shown.
    """
    figure = _new_figure(figsize=(12, 4.5))
    limit = float(before.detach().abs().float().quantile(0.995)) or 1.0
    for ax, matrix, name in zip(figure.subplots(1, 2), (before, after), ("dense", "compressed"), strict=True):
        plot_weight(matrix, limit, ax, block_shape).set_title(name)
    figure.suptitle(title)
    return figure


def plot_residuals(report: CompressionReport | Sequence[Update], ax: Axes | None = None) -> Axes:
    """Draw how the primal and dual residuals fell over the updates, with the hard projection last.

    Args:
        report: A report, or a run's history.
        ax: Where to draw; a new figure if not given.

    Returns:
        The axes that were drawn on.
    """
    history = report.history if isinstance(report, CompressionReport) else tuple(report)
    ax = ax if ax is not None else _new_axes()
    when = [update.when for update in history]
    ax.plot(when, [update.primal for update in history], "o-", label="primal |W - Z| / |W|")
    ax.plot(when[:-1], [update.dual for update in history[:-1]], "s--", label="dual |Z - Z_old| / |W|")
    ax.set(xlabel="epoch or step of the update", ylabel="residual", ylim=(0, None))
    ax.legend()
    return ax


def _new_figure(**options: Any) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MuwsError("figures need matplotlib: pip install 'lightning-muws[plots]'") from None
    return Figure(layout="constrained", **options)


def _new_axes() -> Axes:
    return _new_figure().subplots()
