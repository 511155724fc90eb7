"""Figures are drawn without a display."""

import pickle
import sys

import numpy as np
import pytest
import torch

from lightning_muws import MicroStructure, MuwsError
from lightning_muws.plots import (
    layer_picture,
    plot_before_after,
    plot_layer,
    plot_residuals,
    plot_sensitivity,
    plot_weight,
)
from lightning_muws.structure.block_map import BlockMap
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.sensitivity import LayerSensitivity, Point, SensitivityReport
from lightning_muws.training.run import Update
from tests.support.strategies import normal


def test_before_and_after_show_both_matrices(tmp_path):
    before = normal(0, 16, 12)
    after = MicroStructure(prune_ratio=0.5).project(before)
    figure = plot_before_after(before, after, (4, 4), "layer")
    shown = [torch.tensor(ax.images[0].get_array().data) for ax in figure.axes[:2]]
    torch.testing.assert_close(shown[0], before.float())
    torch.testing.assert_close(shown[1], after.float())
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_residuals_are_drawn_in_order():
    history = [Update(1, 0.1, 0.5, 0.4), Update(2, 0.2, 0.3, 0.2), Update(3, 0.3, 0.1, 0.0)]
    primal, dual = plot_residuals(history).lines
    assert primal.get_ydata().tolist() == [0.5, 0.3, 0.1]
    assert dual.get_ydata().tolist() == [0.4, 0.2]


def test_a_picture_of_blocks_has_a_colour_bar_and_its_shares_of_zeros(tmp_path):
    before = normal(0, 16, 12)
    figure = plot_before_after(before, MicroStructure(prune_ratio=0.5).project(before), (4, 4), "layer")
    dense, compressed, bar = figure.axes
    assert (dense.get_title(), compressed.get_title()) == ("dense: 0% zeros", "compressed: 50% zeros")
    assert bar.get_ylabel() == "weight (white: zero)"
    assert len(plot_weight(before, 1.0).figure.axes) == 2
    assert len(plot_weight(before, 1.0, dense).figure.axes) == 3  # the caller's figure keeps its own colour bar


def test_a_picture_of_residuals_has_a_title_and_the_phases():
    updates = [Update(1, 0.1, 0.5, 0.4), Update(2, 0.2, 0.3, 0.2)]
    ax = plot_residuals([*updates, Update(3, 0.3, 0.1, 0.0)])
    assert ax.get_title() == "Residuals"
    assert [text.get_text() for text in ax.texts] == ["method", "retraining"]
    assert [text.get_text().split()[0] for text in ax.get_legend().get_texts()] == ["primal", "dual", "projection"]
    still = plot_residuals(updates)  # in the middle of ADMM: nothing was projected yet
    assert [text.get_text() for text in still.texts] == ["method"]
    assert still.lines[1].get_ydata().tolist() == [0.4, 0.2]
    one_shot = plot_residuals([Update(3, 0.3, 0.1, 0.0)])
    assert [text.get_text() for text in one_shot.texts] == ["retraining"]


def test_a_picture_of_sensitivities_has_a_line_a_layer_and_names_the_most_sensitive():
    layers = [
        LayerSensitivity(f"l{i}", (4, 4), 1.0, (Point(2.0, 1.0, 0.5 + i), Point(5.0, 2.0, 0.5 + 2 * i), None))
        for i in range(12)
    ]
    ax = plot_sensitivity(SensitivityReport((2.0, 5.0, 10.0), 0.5, tuple(layers)))
    assert len(ax.lines) == 13
    assert ax.lines[3].get_xdata().tolist() == [2.0, 5.0]
    assert ax.lines[3].get_ydata().tolist() == [3.5, 6.5]
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == [*(f"l{i}" for i in range(2, 12)), "without compression"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["2", "5", "10"]
    assert ax._repr_png_().startswith(b"\x89PNG")


def test_a_picture_of_a_layer_has_legends_a_colour_bar_the_caption_and_the_phases():
    structure, grid = MicroStructure((2, 4), 0.5, 0.25), BlockGrid((2, 4))
    weight = structure.project(normal(0, 18, 34), grid, "w")
    support, _ = structure.nearest(weight, grid, "w")
    history = [Update(1, 0.1, 0.5, 0.4), Update(2, 0.2, 0.3, 0.2)]
    figure = plot_layer("layer\x1b.weight", weight, grid, support.kinds, history, "admm, epoch 2")
    where, size, shares, run, bar = figure.axes
    assert figure.get_suptitle() == "layer\\x1b.weight: admm, epoch 2"
    assert [text.get_text() for text in where.get_legend().get_texts()] == ["free: 18", "unified: 18", "pruned: 36"]
    assert np.array_equal(where.images[0].get_array(), BlockMap.of(support.kinds).pixels())
    means = grid.split(weight).abs().mean(1).view(9, 8)
    torch.testing.assert_close(torch.tensor(size.images[0].get_array().data), means, check_dtype=False)
    assert bar.get_ylabel() == "mean |weight|"
    assert [text.get_text() for text in shares.get_legend().get_texts()] == ["free", "unified", "pruned"]
    counts = [sum(patch.get_height() for patch in kind) for kind in shares.containers]
    assert counts == [18 * 8 + 18 * 2, 18 * 8, 36 * 8], "each weight is in the histogram once, edges with the free ones"
    assert [text.get_text() for text in run.texts] == ["method"]
    pixels = layer_picture("w", weight, grid, support.kinds)
    assert pixels.shape[2] == 3
    assert pixels.dtype == np.uint8
    assert len(np.unique(pixels)) > 50


def test_a_run_without_updates_says_when_there_is_something_to_draw():
    with pytest.raises(MuwsError, match="no update yet"):
        plot_residuals([])


def test_a_notebook_shows_a_picture():
    before = normal(0, 16, 12)
    pictures = (
        plot_weight(before, 1.0), plot_before_after(before, before, (4, 4)), plot_residuals([Update(3, 0.3, 0.1, 0.0)])
    )  # fmt: skip
    for picture in pictures:
        assert picture._repr_png_().startswith(b"\x89PNG")
        pickle.loads(pickle.dumps(picture))._repr_png_()  # noqa: S301  our own bytes


def test_without_matplotlib_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MuwsError, match=r"pip install 'lightning-muws\[plots\]'"):
        plot_weight(torch.ones(2, 2), 1.0)
