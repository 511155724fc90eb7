"""Quantisation-aware training: the forward pass sees integer codes, straight through, with learned steps (LSQ)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from contestants.arena import EPOCHS, Arena, Stored, fit
from contestants.packed import smallest
from contestants.sized import muws

END_BITS = 8  # of the first and the last layer, and of all biases, as is customary
LEVELS = {"8": (-128, 127), "4": (-8, 7), "3": (-4, 3), "2": (-2, 1), "ternary": (-1, 1)}


class _Rounded(torch.autograd.Function):
    """Rounds; the gradient passes straight through (Bengio et al. 2013)."""

    @staticmethod
    def forward(_: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(_: object, gradient: Tensor) -> Tensor:
        return gradient


class Grid(nn.Module):
    """Whole multiples of one learned step (Esser et al. 2020, Learned Step Size Quantization).

    Its logarithm is learned, so that Adam moves it by a thousandth at a time, however small it is.

    Args:
        weight: Whose mean magnitude gives the first step.
        levels: The least and the largest code.
        mask: What stays; everything else is 0.
    """

    def __init__(self, weight: Tensor, levels: tuple[int, int], mask: Tensor | None = None) -> None:
        super().__init__()
        self.least, self.most = levels
        sizes = (weight if mask is None else weight[mask]).detach().abs()
        first = 2 * sizes.mean() / self.most**0.5  # section 2.1 there
        if self.most > 15:  # nothing is clipped at first: with eight bits that costs more than it brings
            first = sizes.max() / self.most
        self.log_step = nn.Parameter(first.clamp_min(1e-8).log())
        self.register_buffer("mask", mask)

    @property
    def step(self) -> Tensor:
        """What one code is worth."""
        return self.log_step.exp()

    def forward(self, weight: Tensor) -> Tensor:
        step = self.step
        codes = _Rounded.apply((weight / step).clamp(self.least, self.most))
        return step * (codes if self.mask is None else codes * self.mask)


def on_grids(model: nn.Module, levels: tuple[int, int], masks: dict[str, Tensor] | None = None) -> dict[str, Grid]:
    """Let every parameter of a network be computed from its grid, and return the grids by the parameter's name."""
    names = [name for name, p in model.named_parameters() if p.ndim > 1]
    grids = {}
    for name, p in list(model.named_parameters()):
        is_end = p.ndim < 2 or name in (names[0], names[-1])
        own = LEVELS[str(END_BITS)] if is_end else levels
        grids[name] = Grid(p.data, own, (masks or {}).get(name))
        place, _, leaf = name.rpartition(".")
        parametrize.register_parametrization(model.get_submodule(place), leaf, grids[name], unsafe=True)
    return grids


def stored(model: nn.Module, grids: dict[str, Grid]) -> list[Stored]:
    """Return the files of a network on its grids: our lossless one, and integer codes through lzma and zstd."""
    steps = {name: float(grid.step.detach()) for name, grid in grids.items()}
    for name in grids:
        place, _, leaf = name.rpartition(".")
        parametrize.remove_parametrizations(model.get_submodule(place), leaf, leave_parametrized=True)
    state = {name: x.detach() for name, x in model.state_dict().items()}
    coded = smallest(state, steps)
    return [muws(coded.state, "muws, lossless"), coded]


def qat(arena: Arena, setting: str) -> dict:
    """Return the row of a network on so many bits; the first and the last layer, and biases, have eight."""
    model = arena.start()
    grids = on_grids(model, LEVELS[setting])
    fit(model, arena.data, EPOCHS)
    return arena.judged(stored(model, grids))


SETTINGS = {qat: tuple(LEVELS)}
