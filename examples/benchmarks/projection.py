"""Measures `project` on ten million weights against a copy of that tensor. Run: make bench."""

from __future__ import annotations

from statistics import median

import torch
from machine import console, interleaved, ratios, say_machine
from rich.table import Table

from lightning_muws import MicroStructure

BOUND = 25  # times a copy, for the default block shape


def main() -> None:
    say_machine()
    weight = torch.randn(2500, 4000, generator=torch.Generator().manual_seed(0)) * 0.1
    there = torch.empty_like(weight)
    structures = {
        f"{r}x{c}, {prune:.0%} pruned, {unify:.0%} unified": MicroStructure((r, c), prune, unify)
        for (r, c) in ((4, 4), (4, 1), (8, 8))
        for prune, unify in ((0.8, 0.1), (0.9, 0.0), (0.0, 0.5))
    }
    tasks = {"copy (clone)": weight.clone, "copy into memory at hand": lambda: there.copy_(weight)}
    tasks |= {name: (lambda s=s: s.project(weight)) for name, s in structures.items()}
    times = interleaved(tasks)
    table = Table(title="project on 10,000,000 float32 weights")
    for header in ("", "ms", "times a clone", "least", "largest", "times a copy into memory at hand"):
        table.add_column(header, justify="right" if header else "left")
    to_clone, to_copy = ratios(times, "copy (clone)"), ratios(times, "copy into memory at hand")
    for name in tasks:
        middle, least, largest = to_clone[name]
        numbers = (f"{1e3 * median(times[name]):.1f}", f"{middle:.2f}", f"{least:.2f}", f"{largest:.2f}")
        table.add_row(name, *numbers, f"{to_copy[name][0]:.1f}")
    console.print(table)
    worst = max(to_clone[name][0] for name in structures if name.startswith("4x4"))
    console.print(
        f"4x4 blocks: at most {worst:.1f} times a clone; bound {BOUND}: {'met' if worst < BOUND else 'MISSED'}"
    )


if __name__ == "__main__":
    main()
