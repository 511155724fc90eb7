"""Deep Compression (Han et al. 2016): single weights pruned, the others on a trained grid of four bits, then coded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from contestants.arena import EPOCHS, Arena, fit, steps_of
from contestants.quantised import LEVELS, on_grids, stored

PRUNING_EPOCHS = 5  # of the ten; then the mask is fixed and the grid trains


def deep(arena: Arena, setting: str) -> dict:
    """Return the row of a network with so many percent of its weights pruned, kept ones on four bits.

    The share grows along a cubic (Zhu and Gupta 2017), with one threshold of magnitude for the network.
    """
    model, share = arena.start(), float(setting) / 100
    prune_gradually(arena, model, share)
    masks = {name: p.data != 0 for name, p in model.named_parameters() if p.ndim > 1}
    grids = on_grids(model, LEVELS["4"], masks)
    fit(model, arena.data, EPOCHS - PRUNING_EPOCHS)
    return arena.judged(stored(model, grids))


def prune_gradually(arena: Arena, model: nn.Module, share: float) -> None:
    """Train for half of the epochs while the smallest weights of the network become 0."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    masks: list[Tensor] = []
    n_steps = steps_of(arena.data, PRUNING_EPOCHS)

    def prune(step: int) -> None:
        if step % 20 == 0 or step == n_steps - 1:
            done = min(1.0, step / (0.8 * n_steps))
            masks[:] = global_masks(weights, share * (1 - (1 - done) ** 3))
        for p, mask in zip(weights, masks, strict=True):
            p.data.mul_(mask)

    fit(model, arena.data, PRUNING_EPOCHS, after_step=prune)


def global_masks(weights: list[Tensor], share: float) -> list[Tensor]:
    """Return which weights stay when a share of all of them, the smallest, is pruned.

    Example:
        >>> [mask.tolist() for mask in global_masks([torch.tensor([1.0, -4.0]), torch.tensor([-2.0, 3.0])], 0.5)]
        [[False, True], [False, True]]
    """
    sizes = torch.cat([p.detach().abs().reshape(-1) for p in weights])
    n_pruned = round(share * len(sizes))
    if not n_pruned:
        return [torch.ones_like(p, dtype=torch.bool) for p in weights]
    threshold = sizes.kthvalue(n_pruned).values
    return [p.detach().abs() > threshold for p in weights]


SETTINGS = {deep: ("80", "90", "95", "97", "98.5")}
