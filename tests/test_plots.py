"""Figures are drawn without a display."""

import sys

import pytest
import torch

from lightning_muws import MicroStructure, MuwsError
from lightning_muws.plots import plot_before_after, plot_residuals, plot_weight
from lightning_muws.training.run import Update
from tests.support.strategies import normal


def test_before_and_after_show_both_matrices(tmp_path):
    before = normal(0, 16, 12)
    after = MicroStructure(prune_ratio=0.5).project(before)
    figure = plot_before_after(before, after, (4, 4), "layer")
    shown = [torch.tensor(ax.images[0].get_array().data) for ax in figure.axes]
    torch.testing.assert_close(shown[0], before.float())
    torch.testing.assert_close(shown[1], after.float())
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_residuals_are_drawn_in_order():
    history = [Update(1, 0.1, 0.5, 0.4), Update(2, 0.2, 0.3, 0.2), Update(3, 0.3, 0.1, 0.0)]
    primal, dual = plot_residuals(history).lines
    assert primal.get_ydata().tolist() == [0.5, 0.3, 0.1]
    assert dual.get_ydata().tolist() == [0.4, 0.2]


def test_without_matplotlib_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MuwsError, match=r"pip install 'lightning-muws\[plots\]'"):
        plot_weight(torch.ones(2, 2), 1.0)
