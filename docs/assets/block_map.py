"""Draw docs/assets/block_map.png from the files of the demo.

Run: make demo, then .venv/bin/python docs/assets/block_map.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lightning_muws import load_compressed
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.kinds import Kind
from lightning_muws.structure.micro import MicroStructure

LAYER, ROWS, COLS = "classifier.0.weight", 32, 48
BLOCK = 4
COLOURS = {Kind.PRUNED: "#f1f3f5", Kind.UNIFIED: "#f4a259", Kind.DENSE: "#3d5a80"}
LABELS = {
    Kind.PRUNED: "pruned: all zero",
    Kind.UNIFIED: "unified: one magnitude, free signs",
    Kind.DENSE: "dense: free weights",
}


def kinds_of(weight: np.ndarray) -> np.ndarray:
    """Return the kind of each block of a ``(rows, cols)`` weight; shape ``(rows / 4, cols / 4)``."""
    blocks = np.abs(weight).reshape(ROWS // BLOCK, BLOCK, COLS // BLOCK, BLOCK)
    least, most = blocks.min(axis=(1, 3)), blocks.max(axis=(1, 3))
    return np.where(most == 0, int(Kind.PRUNED), np.where(least == most, int(Kind.UNIFIED), int(Kind.DENSE)))


def draw(before: np.ndarray, after: np.ndarray) -> Figure:
    """Return the figure: the dense weight, the compressed weight, and the kind of each block."""
    figure = Figure(figsize=(11, 3.3), facecolor="white")
    axes = figure.subplots(1, 3, gridspec_kw={"left": 0.01, "right": 0.99, "bottom": 0.24, "top": 0.92, "wspace": 0.04})
    limit = float(np.quantile(np.abs(after), 0.98))
    for ax, weight, title in zip(axes, (before, after), ("Trained dense", "Trained with the callback"), strict=False):
        image = ax.imshow(weight, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        ax.set_title(title)
    order = [Kind.PRUNED, Kind.UNIFIED, Kind.DENSE]
    rank = np.zeros(3, dtype=int)
    rank[[int(kind) for kind in order]] = range(3)
    tiles = np.kron(rank[kinds_of(after)], np.ones((BLOCK, BLOCK), dtype=int))
    axes[2].imshow(tiles, cmap=ListedColormap([COLOURS[kind] for kind in order]), vmin=0, vmax=2)
    axes[2].set_title("Kind of each 4x4 block")
    for ax in axes:
        ax.hlines(np.arange(0, ROWS + 1, BLOCK) - 0.5, -0.5, COLS - 0.5, color="0.75", linewidth=0.6)
        ax.vlines(np.arange(0, COLS + 1, BLOCK) - 0.5, -0.5, ROWS - 0.5, color="0.75", linewidth=0.6)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    bar = figure.colorbar(image, cax=figure.add_axes((0.2, 0.13, 0.25, 0.035)), orientation="horizontal")
    bar.set_label("weight", labelpad=0)
    bar.outline.set_visible(False)
    handles = [Patch(facecolor=COLOURS[kind], edgecolor="0.75", label=LABELS[kind]) for kind in order]
    figure.legend(handles=handles, loc="lower right", bbox_to_anchor=(0.995, 0.0), frameon=False, fontsize=9)
    return figure


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--demo", type=Path, default=Path("output"), help="folder that the demo wrote")
    options.add_argument("--output", type=Path, default=Path(__file__).with_name("block_map.png"))
    chosen = options.parse_args()
    grid = BlockGrid(MicroStructure().block_shape)
    states = torch.load(chosen.demo / "dense.pt", weights_only=True), load_compressed(chosen.demo / "model.muws")
    before, after = (grid.matrix(state[LAYER])[:ROWS, :COLS].numpy() for state in states)
    draw(before, after).savefig(chosen.output, dpi=150)


if __name__ == "__main__":
    main()
