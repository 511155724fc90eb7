"""Estimates how much smaller a file gets with other ways to cut weights into blocks, on the networks of `weighting`.

`auto` gives each weight the cheapest of the block shapes. `coarse to fine` takes 2x2 neighbouring 4x4 blocks as one 8x8
block where that is cheaper: unified with one magnitude, pruned whole, or left as four blocks of any kind. Networks are
not trained further. At the price of a bit that a budget with 4x4 blocks ends with, each way has a cost: its bits, and
what its distances cost in bits. The table has the difference of the costs over the bits of the weights, which is to
first order what they get smaller by at equal distance. Run: make bench-weighting.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from fitting import be_quiet
from machine import console, say_machine
from rich.progress import track
from rich.table import Table
from torch import Tensor
from weighting import network

from lightning_muws import MicroStructure
from lightning_muws.structure.budget import RECOVERY, allocate
from lightning_muws.structure.grid import BlockGrid
from lightning_muws.structure.layer import ROUNDS, Bounds, Layer, measure
from lightning_muws.structure.plan import make_plan

SMALL, LARGE = (4, 4), (8, 8)


def joined(small: Layer, large: Layer, shape: tuple[int, int], price: float) -> float:
    """Return what a weight costs in bits if 2x2 of its 4x4 blocks may be one 8x8 block; a flag of each tells.

    Args:
        small: The weight in 4x4 blocks.
        large: The same in 8x8 blocks.
        shape: How many rows and columns of 4x4 blocks there are.
        price: Of a bit.
    """
    (down, across), prices = shape, small.settle(price)[0]
    at = torch.arange(down * across).view(shape)[: down // 2 * 2, : across // 2 * 2]
    children = at.reshape(down // 2, 2, across // 2, 2).transpose(1, 2).reshape(-1, 4)
    alone = torch.ones(down * across, dtype=torch.bool)
    alone[children.flatten()] = False
    apart = small.costs(price, prices).min(0).values
    together = large.costs(price, prices)[1:].min(0).values  # a large block of free weights is four small ones
    flags = torch.tensor([0.5, 0.5])
    options = torch.stack([apart[children].sum(1), together])
    for _ in range(ROUNDS):
        chosen = (options - flags.log2()[:, None]).argmin(0)
        flags = (chosen.bincount(minlength=2) + 0.5) / (len(children) + 1)
    values = small.n_free * (prices.free.bits + small.importance / price * prices.free.error)
    return float((options - flags.log2()[:, None]).min(0).values.sum() + apart[alone].sum()) + values


def costs(x: Tensor, bounds: Bounds, importance: float, price: float) -> tuple[float, dict[str, float]]:
    """Return the bits of a weight in 4x4 blocks, and what each way to cut it costs in bits."""

    def layer(grid: BlockGrid) -> Layer:
        return replace(measure("weight", x, Bounds(grid, bounds.signs), importance), recovery=RECOVERY)

    grid = bounds.grid
    fine = layer(grid)
    found = {"4x4": fine.cost(price)}
    found["auto"] = min(layer(one.grid).cost(price) for one in Bounds(grid, is_auto=True).fitting(x.shape))
    found["coarse to fine"] = found["4x4"]
    if 0 not in (coarse := replace(grid, block_shape=LARGE)).counts(x.shape):
        found["coarse to fine"] = min(found["4x4"], joined(fine, layer(coarse), grid.counts(x.shape), price))
    return 8 * fine.share(price).n_bytes, found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--networks", nargs="+", default=["demo", "FFDNet", "MiniLM"])
    options.add_argument("--compressions", type=float, nargs="+", default=[10, 20, 50, 100])
    chosen = options.parse_args()
    be_quiet()
    say_machine()
    table = Table("network", *(f"{c:g}x" for c in chosen.compressions), title="smaller by: auto, coarse to fine")
    for name in chosen.networks:
        model = network(name)[0]
        plan = make_plan(model, MicroStructure(SMALL), open_ratios=True)
        bounds = {key: Bounds.of(entry) for key, entry in plan.covered.items()}
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        tensors = {key: x.detach() for key, x in (parameters | buffers).items()}
        row = []
        for compression in track(chosen.compressions, name, console=console):
            found = allocate(tensors, bounds, compression, buffers=buffers)
            each = [
                costs(tensors[key], bound, found.importance[key], found.multiplier) for key, bound in bounds.items()
            ]
            bits = sum(n_bits for n_bits, _ in each)
            saved = [sum(c["4x4"] - c[way] for _, c in each) / bits for way in ("auto", "coarse to fine")]
            row.append(", ".join(f"{share:.1%}" for share in saved))
        table.add_row(name, *row)
    console.print(table)


if __name__ == "__main__":
    main()
